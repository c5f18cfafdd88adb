"""What goes through an S3 that fails is the same as what goes through one that does not."""

import multiprocessing
import resource
import time
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pytest

from cluster import storage
from cluster.s3 import PatientS3
from pipelines.tables import open_table, read_rows, read_table, table_writer
from tests.faults.failing_s3 import KINDS, FailingS3, harmless, seeded

SCHEMA = pa.schema([("n", pa.int64()), ("image", pa.binary())])
GROUP = 16
MIB = 2**20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOCA_CACHE", str(tmp_path / "cache"))


def table(start: int, rows: int) -> pa.Table:
    """Rows of 50 kB that do not compress."""
    images = [np.random.default_rng(n).bytes(50_000) for n in range(start, start + rows)]
    return pa.table({"n": range(start, start + rows), "image": pa.array(images, pa.binary())})


def write(uri: str) -> None:
    """A table of 24 MB: two parts."""
    with table_writer(uri, SCHEMA, GROUP) as writer:
        for start in range(0, 480, 30):
            writer.write(table(start, 30))


def folder_of_files(folder: Path) -> str:
    """Ten small files, one that a read fetches in several pieces, and one that goes up in three parts."""
    for number in range(10):
        path = folder / f"d{number % 3}" / f"{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * (number * 1000 + 1))
    (folder / "large.bin").write_bytes(np.random.default_rng(0).bytes(36 * MIB))
    return str(folder)


def uploads() -> list[dict]:
    return boto3.client("s3").list_multipart_uploads(Bucket="bucket").get("Uploads", [])


def everything(uri: str, folder: str) -> dict:
    """All that storage does, and what it gave."""
    name = storage.join(uri, "table.parquet")
    write(name)
    storage.upload(folder, storage.join(uri, "folder"))
    storage.write_atomic(storage.join(uri, "record.json"), b"{}")
    local = Path(storage.localize(storage.join(uri, "folder")))
    open_table.cache_clear()
    seen = {
        "exists": [storage.exists(storage.join(uri, part)) for part in ("table.parquet", "folder", "nothing")],
        "list": storage.list_files(uri),
        "rows": read_rows(name, [479, 0, 17, 250], GROUP),
        "table": read_table(name).equals(table(0, 480)),
        "record": storage.read_bytes(storage.join(uri, "record.json")),
        "localized": {str(p.relative_to(local)): p.read_bytes() for p in local.rglob("*") if p.is_file()},
        "digests": [storage.digest(storage.join(uri, part)) for part in ("folder", "folder/*/*.bin", "table.parquet")],
    }
    storage.delete(storage.join(uri, "folder"))
    return seen | {"left": storage.list_files(uri)}


def test_all_results_are_those_of_an_undisturbed_storage(failing_s3: FailingS3, tmp_path: Path) -> None:
    folder = folder_of_files(tmp_path / "folder")
    disturbed, quiet = storage.join(failing_s3.uri, "disturbed"), storage.join(failing_s3.uri, "quiet")
    seen = everything(disturbed, folder)
    assert set(failing_s3.injected) == set(KINDS), failing_s3.injected
    assert failing_s3.injected.total() > 0.15 * failing_s3.faults.requests.total()
    with failing_s3.undisturbed():
        assert seen == everything(quiet, folder)
        assert seen["localized"]["large.bin"] == (Path(folder) / "large.bin").read_bytes()
        for name, _ in storage.list_files(quiet):
            assert storage.read_bytes(storage.join(disturbed, name)) == storage.read_bytes(storage.join(quiet, name))
        assert not uploads() or "lost" in failing_s3.injected  # an upload whose beginning got lost is nobody's


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"stall", "500"}))  # 500 is repeated as 503 is
def test_every_request_may_fail_three_times(failing_s3: FailingS3, kind: str) -> None:
    failing_s3.faults.plan = lambda request, seen, in_a_row: kind if in_a_row < 3 else None
    uri = storage.join(failing_s3.uri, kind, "table.parquet")
    with table_writer(uri, SCHEMA, GROUP) as writer:
        writer.write(table(0, 20))
    assert [row["n"] for row in read_rows(uri, [19, 3], GROUP)] == [19, 3]
    assert set(failing_s3.injected) <= {kind, "lost"}  # what has no body to cut is lost


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_other_plans(failing_s3: FailingS3, tmp_path: Path, seed: int) -> None:
    failing_s3.faults.plan = seeded(seed, share=0.5)
    folder = folder_of_files(tmp_path / "folder")
    seen = everything(storage.join(failing_s3.uri, f"plan-{seed}"), folder)
    with failing_s3.undisturbed():
        assert seen == everything(storage.join(failing_s3.uri, f"quiet-{seed}"), folder)


def completes(request: str) -> bool:
    return request.startswith("POST") and "uploadId" in request


def test_the_lost_answer_to_a_completed_upload_is_no_failure(failing_s3: FailingS3) -> None:
    def lose(request: str, seen: int, in_a_row: int) -> str | None:
        return ("404" if seen else "lost") if completes(request) else None  # many storages forget what is complete

    failing_s3.faults.plan = lose
    uri = storage.join(failing_s3.uri, "completed.bin")
    storage.write_atomic(uri, b"z" * (17 * MIB))
    assert failing_s3.injected == {"lost": 1, "404": 1}
    assert storage.read_bytes(uri) == b"z" * (17 * MIB)


def test_an_upload_that_somebody_else_ended_is_a_failure(failing_s3: FailingS3) -> None:
    failing_s3.faults.plan = lambda request, seen, in_a_row: "404" if completes(request) else None
    uri = storage.join(failing_s3.uri, "ended.bin")
    storage.write_atomic(uri, b"what was there before")
    with pytest.raises(FileNotFoundError, match=r"complete_multipart_upload of s3://bucket/ended\.bin"):
        storage.write_atomic(uri, b"z" * (17 * MIB))
    assert storage.read_bytes(uri) == b"what was there before"


def test_an_exception_in_a_writer_leaves_nothing(failing_s3: FailingS3) -> None:
    uri = storage.join(failing_s3.uri, "interrupted", "table.parquet")
    with pytest.raises(RuntimeError, match="interrupted"), table_writer(uri, SCHEMA, GROUP) as writer:
        writer.write(table(0, 400))
        with failing_s3.undisturbed():
            assert uploads()  # it was in the middle
        raise RuntimeError("interrupted")
    with failing_s3.undisturbed():
        assert not storage.exists(uri)
        assert not [upload for upload in uploads() if upload["Key"].startswith("interrupted") and not _empty(upload)]


def _empty(upload: dict) -> bool:
    """Whether it never got a part: the answer to its beginning was lost, so its writer began another."""
    parts = boto3.client("s3").list_parts(Bucket="bucket", Key=upload["Key"], UploadId=upload["UploadId"])
    return not parts.get("Parts")


def _write_and_wait(uri: str, half: object) -> None:
    with table_writer(uri, SCHEMA, GROUP) as writer:
        writer.write(table(0, 400))
        half.set()
        time.sleep(600)


def test_a_killed_writer_leaves_no_object_and_the_next_one_succeeds(failing_s3: FailingS3) -> None:
    uri = storage.join(failing_s3.uri, "killed", "table.parquet")
    spawn = multiprocessing.get_context("spawn")
    half = spawn.Event()
    writer = spawn.Process(target=_write_and_wait, args=(uri, half))
    writer.start()
    assert half.wait(60)
    writer.kill()
    writer.join()
    with failing_s3.undisturbed():
        assert [upload for upload in uploads() if upload["Key"] == "killed/table.parquet"]
        assert not storage.exists(uri) and storage.list_files(storage.join(failing_s3.uri, "killed")) == []
    write(uri)
    with failing_s3.undisturbed():
        assert read_table(uri).equals(table(0, 480))


def test_permanent_errors_fail_at_once_and_name_the_object(failing_s3: FailingS3) -> None:
    failing_s3.faults.plan = lambda *_: "403"
    uri = storage.join(failing_s3.uri, "forbidden")
    for call in (storage.read_bytes, storage.exists, storage.digest, storage.delete, storage.list_files):
        started = time.monotonic()
        with pytest.raises(PermissionError, match="s3://bucket/forbidden"):
            call(uri)
        assert time.monotonic() - started < 2
    with pytest.raises(PermissionError, match="put_object of s3://bucket/forbidden"):
        storage.write_atomic(uri, b"")
    assert failing_s3.injected.total() <= 8  # one for each call, and some ask twice


def test_a_bucket_that_does_not_exist(failing_s3: FailingS3) -> None:
    failing_s3.faults.plan = harmless
    for call in (storage.read_bytes, lambda uri: storage.write_atomic(uri, b"x")):
        with pytest.raises(FileNotFoundError, match="s3://no-such-bucket/x"):
            call("s3://no-such-bucket/x")
    assert failing_s3.faults.requests.total() <= 3


def test_a_server_that_does_not_recover_is_given_up(failing_s3: FailingS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientS3, "retries", 3)
    failing_s3.faults.plan = lambda *_: "500"
    with pytest.raises(OSError, match=r"internal error.*get_object of s3://bucket/x"):
        storage.read_bytes("s3://bucket/x")
    assert failing_s3.injected["500"] == 3  # one layer of repetitions, not two that multiply
    failing_s3.faults.plan = lambda *_: "lost"
    with pytest.raises(OSError, match=r"get_object of s3://bucket/x"):
        storage.read_bytes("s3://bucket/x")
    assert failing_s3.injected["lost"] <= 6  # aiohttp itself repeats once what fails on a connection that was kept open


def _write_and_weigh(uri: str, grown: object) -> None:
    def most() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    storage.write_atomic(uri, bytes(20 * MIB))  # all that is imported and connected
    before = most()
    with storage.open_writer(uri) as file:
        for _ in range(16):
            file.write(bytes(5 * MIB))
    grown.put(most() - before)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_large_file_is_never_in_memory_as_a_whole(place: str, s3: str, tmp_path: Path) -> None:
    root = s3 if place == "s3" else str(tmp_path)
    spawn = multiprocessing.get_context("spawn")
    grown = spawn.SimpleQueue()
    writer = spawn.Process(target=_write_and_weigh, args=(storage.join(root, "big"), grown))
    writer.start()
    writer.join(60)
    assert grown.get() < 50 * MIB
    assert storage.list_files(storage.join(root, "big")) == [("big", 80 * MIB)]
