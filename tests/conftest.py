"""What tests of several folders share: an S3 server on loopback, and a Ray inside this process."""

import json
import shutil
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import fsspec.config
import pytest

from tests.faults.failing_s3 import SETTINGS, FailingProxy, FailingS3, Faults, harmless, seeded


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The run of the whole pipeline takes longest, so it comes first."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/e2e/"))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Two processes share the tests file by file; those that look at one run of the whole pipeline stay together."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/e2e" if nodeid.startswith("tests/e2e/") else super()._split_scope(nodeid)

    return Together(config, log)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, str]]:
    """The environment that reaches an S3 server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.stop()


@pytest.fixture(scope="module")
def s3(s3_server: dict[str, str]) -> Iterator[str]:
    """The URI of a bucket, empty for every module; the environment holds what reaches it."""
    import boto3

    endpoint = s3_server["AWS_ENDPOINT_URL"]
    with pytest.MonkeyPatch.context() as patch:
        set_all(patch, s3_server)
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"


@pytest.fixture(scope="session")
def s3_proxy(s3_server: dict[str, str]) -> Iterator[FailingProxy]:
    """What stands before the server for those who are to see it fail."""
    proxy = FailingProxy(s3_server["AWS_ENDPOINT_URL"])
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield proxy
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture
def failing_s3(s3: str, s3_proxy: FailingProxy) -> Iterator[FailingS3]:
    """S3 below `.uri` of which a quarter of the requests fails, in all ways of KINDS; see tests/faults/failing_s3.py."""
    from cluster.s3 import PatientS3

    s3_proxy.faults = Faults(seeded(seed=1, share=0.25))
    PatientS3.clear_instance_cache()  # no connections of another test
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", s3_proxy.endpoint)
        patch.setenv("FSSPEC_S3", json.dumps(SETTINGS))  # for the processes that a test starts
        patch.setitem(fsspec.config.conf, "s3", SETTINGS)  # for this one
        yield FailingS3(s3, s3_proxy.faults, f"http://{s3_proxy.target}")
    s3_proxy.faults = Faults(harmless)


@pytest.fixture(scope="session")
def ray_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Where the shared Ray and who uses it keep files; it ends with the session."""
    short = tempfile.mkdtemp(prefix="mt-", dir="/tmp")  # the paths of Ray's sockets end at 107 bytes
    yield {"TMPDIR": short, "MOCA_CACHE": str(tmp_path_factory.mktemp("cache"))}
    import ray

    ray.shutdown()
    shutil.rmtree(short, ignore_errors=True)


@pytest.fixture(scope="module")
def ray_session(ray_folders: dict[str, str], s3_server: dict[str, str], s3_proxy: FailingProxy) -> Iterator[None]:
    """A Ray inside this process: one for all modules that ask, a new one where a module left it stopped or at work."""
    import ray

    from cluster.session import ClusterConfig, connect

    of_workers = {**s3_server, "AWS_ENDPOINT_URL": s3_proxy.endpoint, "FSSPEC_S3": json.dumps(SETTINGS)}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        set_all(patch, ray_folders)
        if ray.is_initialized() and not at_rest():
            ray.shutdown()
        with pytest.MonkeyPatch.context() as inherited:  # by all processes that Ray starts
            set_all(inherited, of_workers)
            connect(ClusterConfig())
        yield


def set_all(patch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        patch.setenv(name, value)


def at_rest(patience_s: float = 5.0) -> bool:
    """Whether nothing holds a CPU of Ray's any more."""
    import ray

    deadline = time.monotonic() + patience_s
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(autouse=True)
def forget_digests():
    """What a source holds is asked once by a process; here many runs share one."""
    from pipelines.sources import digest

    digest.cache_clear()
