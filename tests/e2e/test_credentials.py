"""A store that asks for signatures (rclone: another program than the one that all other tests of S3 run against)."""

import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import storage
from cluster.s3 import PatientS3
from tests.conftest import set_all
from tests.faults.failing_s3 import FailingProxy, Faults

SECRET = secrets.token_hex(24)
MIB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address. Buckets are folders, the objects files in them."""
    folder = tmp_path_factory.mktemp("store")
    (folder / "bucket").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"RCLONE_AUTH_KEY": f'"reader,{SECRET}"', "RCLONE_CONFIG": "/dev/null"}
    command = [str(Path(sys.executable).with_name("rclone")), "serve", "s3", "--addr", f"127.0.0.1:{port}", str(folder)]
    with (folder.parent / "rclone.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            break
        except ConnectionRefusedError:
            assert process.poll() is None, (folder.parent / "rclone.log").read_text()
            time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.fixture
def store(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    variables = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "reader",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",  # rclone sends a whole object's sum with a part of it
    }
    set_all(monkeypatch, variables)
    PatientS3.clear_instance_cache()  # it holds the keys of other tests
    return "s3://bucket"


def test_everything_that_storage_does(store: str, tmp_path: Path) -> None:
    large = secrets.token_bytes(40 * MIB)  # three parts
    storage.write_atomic(storage.join(store, "of_all", "large.bin"), large)
    storage.write_atomic(storage.join(store, "of_all", "folder", "small.txt"), b"small")
    filesystem, path = storage.filesystem(storage.join(store, "of_all"))
    pq.write_table(pa.table({"n": range(100_000)}), f"{path}/table.parquet", filesystem=filesystem)
    table = pq.read_table(f"{path}/table.parquet", filesystem=filesystem, filters=[("n", "=", 77)])
    assert table["n"].to_pylist() == [77]
    sizes = dict(storage.list_files(storage.join(store, "of_all")))
    assert sizes.keys() == {"large.bin", "folder/small.txt", "table.parquet"} and sizes["large.bin"] == len(large)
    assert storage.read_bytes(storage.join(store, "of_all", "large.bin")) == large
    storage.delete(storage.join(store, "of_all"))
    assert not storage.exists(storage.join(store, "of_all"))


def test_what_is_interrupted_leaves_nothing(store: str) -> None:
    uri = storage.join(store, "interrupted.bin")
    with pytest.raises(RuntimeError, match="interrupted"), storage.open_writer(uri) as file:
        file.write(bytes(40 * MIB))
        raise RuntimeError("interrupted")
    assert not storage.exists(uri) and not storage.list_files(storage.join(store, "interrupted.bin"))


def test_the_lost_answer_to_a_completed_upload_is_no_failure(store: str, server: str, monkeypatch) -> None:
    def lose(request: str, seen: int, in_a_row: int) -> str | None:
        return ("404" if seen else "lost") if request.startswith("POST") and "uploadId" in request else None

    proxy = FailingProxy(server)
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    proxy.faults = Faults(lose)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    storage.write_atomic(storage.join(store, "completed.bin"), b"z" * (17 * MIB))
    assert proxy.faults.injected == {"lost": 1, "404": 1}
    assert storage.read_bytes(storage.join(store, "completed.bin")) == b"z" * (17 * MIB)
    proxy.shutdown()
    proxy.server_close()


@pytest.mark.parametrize("wrong", ["key", "secret"])
def test_without_the_right_key_nothing_is_read_or_written(store: str, monkeypatch, wrong: str) -> None:
    storage.write_atomic(storage.join(store, "secret.txt"), b"for readers alone")
    PatientS3.clear_instance_cache()
    monkeypatch.setenv({"key": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY"}[wrong], "0" * 48)
    began = time.monotonic()
    with pytest.raises(PermissionError, match=r"s3://bucket/secret\.txt"):
        storage.read_bytes(storage.join(store, "secret.txt"))
    with pytest.raises(PermissionError, match=r"s3://bucket/mine\.txt"):
        storage.write_atomic(storage.join(store, "mine.txt"), b"mine")
    assert time.monotonic() - began < 5  # not repeated: it would be of no use
