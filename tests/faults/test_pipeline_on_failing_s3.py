"""The data path on an S3 that fails, with a data worker killed in the middle: the artifacts are those of an undisturbed run."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import boto3
import psutil
import pytest

from cluster import storage
from moca_core.data.duplicates import CleanRules
from pipelines.runner.record import Artifact
from pipelines.sources import Source
from pipelines.steps.clean import clean_step
from pipelines.steps.corpus import CorpusConfig, corpus_step
from pipelines.steps.pack import PackConfig, pack_step
from pipelines.steps.pairs import PairsConfig, pairs_step
from tests.faults.failing_s3 import FailingS3, harmless
from tests.pipelines.conftest import base, files_of, run_step, write_pairs, write_texts, write_web  # noqa: F401

KEPT = {
    "corpus": ("documents", "keys", "rejected", "groups.parquet"),
    "pairs": ("train", "tasks", "evaluation", "rejected"),
    "clean": ("dropped",),
    "pack": ("rows", "index.parquet", "mixture.txt"),
}


pytestmark = pytest.mark.usefixtures("ray_session")


class Killer(threading.Thread):
    """Ends the first data worker of this process' Ray that works after `start_when` says so, as the kernel would."""

    def __init__(self, start_when: Callable[[], bool]) -> None:
        super().__init__(daemon=True)
        self.start_when, self.killed, self.stop = start_when, 0, False

    def run(self) -> None:
        while not self.killed and not self.stop:
            if self.start_when():
                for process in psutil.Process(os.getpid()).children(recursive=True):
                    try:
                        if "Map" in (name := " ".join(process.cmdline())) and name.startswith("ray::"):
                            process.kill()
                            self.killed = process.pid
                            break
                    except psutil.Error:
                        continue  # it ended
            time.sleep(0.01)

    def __enter__(self) -> "Killer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop = True
        self.join()


def objects(s3: FailingS3, uri: str, folder: str) -> int:
    """How many there are, asked of the server itself."""
    client = boto3.client("s3", endpoint_url=s3.server)
    prefix = storage.join(uri, folder).removeprefix("s3://bucket/")
    return client.list_objects_v2(Bucket="bucket", Prefix=f"{prefix}/").get("KeyCount", 0)


def corpus_config(data: str, **options) -> CorpusConfig:
    web = Source("obelics", storage.join(data, "web"), **options)
    return CorpusConfig(sources=(web, Source("text", storage.join(data, "lines"))))


def data_path(data: str, root: str, base: Artifact) -> dict[str, Artifact]:  # noqa: F811
    made: dict[str, Artifact] = {}
    pairs = PairsConfig(
        train=(Source("triplets", storage.join(data, "pairs/train")),),
        evaluate=(Source("mmeb", storage.join(data, "pairs/evaluate")),),
    )
    steps = [corpus_step(corpus_config(data)), pairs_step(pairs), clean_step(CleanRules(max_image_copies=5))]
    for step in [*steps, pack_step(PackConfig(max_tokens=96, row_tokens=256, window=30))]:
        inputs = {name: made.get(name, base) for name in step.needs}
        made[step.name] = run_step(step, storage.join(root, step.name), **inputs)
    return made


def write_data(folder: Path, files: int) -> None:
    write_web(folder / "web", files)
    write_texts(folder / "lines", 20, files=2)
    write_pairs(folder / "pairs", files=2)


def same(one: Artifact, other: Artifact, name: str) -> None:
    """Bit for bit, but for the names of files and the state that a resumed step looks at."""
    assert one.result == other.result
    ours, theirs = files_of(one.uri, *KEPT[name]), files_of(other.uri, *KEPT[name])
    assert ours.keys() == theirs.keys() and len(ours) > 0
    assert [key for key in ours if ours[key] != theirs[key]] == []


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOCA_CACHE", str(tmp_path / "cache"))


def test_a_corpus_through_a_failing_storage_and_a_killed_worker_is_the_same(
    failing_s3: FailingS3, tmp_path: Path
) -> None:
    write_data(tmp_path / "data", 5)
    data, root = storage.join(failing_s3.uri, "few"), storage.join(failing_s3.uri, "few-root")
    with failing_s3.undisturbed():
        storage.upload(str(tmp_path / "data"), data)
    disturbed = storage.join(root, "disturbed")
    with Killer(lambda: objects(failing_s3, disturbed, "documents") >= 2) as killer:
        one = run_step(corpus_step(corpus_config(data)), disturbed)
    assert killer.killed
    failing_s3.faults.plan = harmless
    two = run_step(corpus_step(corpus_config(data)), storage.join(root, "quiet"))
    assert failing_s3.injected.total() > 20
    assert one.result["documents"] == 5 * 11 + 2 * 19
    with failing_s3.undisturbed():
        same(one, two, "corpus")


@pytest.mark.slow
def test_the_data_path_through_a_failing_storage_and_killed_workers_is_the_same(
    failing_s3: FailingS3,
    tmp_path: Path,
    base: Artifact,  # noqa: F811
) -> None:
    write_data(tmp_path / "data", 24)
    data, root = storage.join(failing_s3.uri, "many"), storage.join(failing_s3.uri, "many-root")
    with failing_s3.undisturbed():
        storage.upload(str(tmp_path / "data"), data)
    disturbed = storage.join(root, "disturbed")
    with (
        Killer(lambda: objects(failing_s3, disturbed, "corpus/documents") >= 8) as first,
        Killer(lambda: objects(failing_s3, disturbed, "pack/rows") >= 3) as second,
    ):
        one = data_path(data, disturbed, base)
    assert first.killed and second.killed
    failing_s3.faults.plan = harmless
    two = data_path(data, storage.join(root, "quiet"), base)
    assert failing_s3.injected.total() > 100
    with failing_s3.undisturbed():
        for name in KEPT:
            same(one[name], two[name], name)
