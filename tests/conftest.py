"""What tests of several folders share: an S3 server on loopback, and a Ray inside this process."""

import time
import urllib.request
from collections.abc import Iterator

import pytest


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
        for name, value in s3_server.items():
            patch.setenv(name, value)
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"


@pytest.fixture(scope="session")
def ray_environment(s3_server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the processes of the shared Ray see; it ends with the session."""
    folders = {name: str(tmp_path_factory.mktemp(name.lower())) for name in ("TMPDIR", "MOCA_CACHE")}
    yield s3_server | folders
    import ray

    ray.shutdown()


@pytest.fixture(scope="module")
def ray_session(ray_environment: dict[str, str]) -> Iterator[None]:
    """A Ray inside this process: one for all modules that ask, a new one where a module left it stopped or at work."""
    import ray

    from cluster.session import ClusterConfig, connect

    with pytest.MonkeyPatch.context() as patch:  # before Ray starts: its workers inherit it
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in ray_environment.items():
            patch.setenv(name, value)
        if ray.is_initialized() and not at_rest():
            ray.shutdown()
        connect(ClusterConfig())
        yield


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
