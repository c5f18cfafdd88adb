"""The pipeline as a job on a running Ray cluster, as a user submits it: with a token, from a working directory."""

import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str, token: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def owned_by(folder: str) -> list[int]:
    """Processes that were started with this folder as Ray's: of this cluster and of no other on the machine."""
    mark, found = f"RAY_TMPDIR={folder}\0".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes() + b"\0" and int(process.name) != os.getpid():
                found.append(int(process.name))
        except OSError:
            continue  # it ended, or is not ours to read
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment of someone who may use the cluster that runs while the module's tests do."""
    folder = tempfile.mkdtemp(prefix="mr-", dir="/tmp")  # short: sockets lie below it, and their paths end at 107 bytes
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "MOCA_"))}
    dashboard, agent, client = (free_port() for _ in range(3))
    environment = inherited | {
        # A job's "python" is looked up on the PATH that the cluster was started with.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    options = {
        "--port": 0,
        "--temp-dir": folder,
        "--node-ip-address": "127.0.0.1",
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": dashboard,
        "--dashboard-agent-listen-port": agent,  # has a fixed default, which any other Ray of the machine holds
        "--ray-client-server-port": client,
        "--num-cpus": 2,  # so many processes start ahead of the first task
        "--object-store-memory": 200_000_000,
    }
    command = [RAY, "start", "--head", "--block", *(str(part) for option in options.items() for part in option)]
    with open(Path(folder, "start.log"), "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        agent_url = f"http://127.0.0.1:{agent}/api/local_raylet_healthz"  # it starts last, and it starts the jobs
        while not answers(agent_url, environment["RAY_AUTH_TOKEN"]):
            assert process.poll() is None and time.monotonic() < deadline, Path(folder, "start.log").read_text()
            time.sleep(0.5)
        yield environment
    finally:
        # Not `ray stop`, which ends every Ray of the machine; and not politely, which takes half a minute.
        os.killpg(process.pid, signal.SIGKILL)
        for pid in owned_by(folder):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two documents, one of them with an image."""
    folder = tmp_path_factory.mktemp("corpus")
    board = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(board, "PNG")
    columns = {
        "texts": pa.array([["A red board.", None], ["A text of a few words"]], pa.list_(pa.string())),
        "images": pa.array([[None, board.getvalue()], [None]], pa.list_(pa.binary())),
    }
    pq.write_table(pa.table(columns), folder / "part.parquet")
    return folder


def pipeline(root: Path, corpus: Path, layout: str) -> list[str]:
    sources = f"corpus.sources=[{{layout: {layout}, path: {corpus}}}]"
    return ["--until", "corpus", "--root", str(root), "--set", sources]


def submit(cluster: dict[str, str], root: Path, corpus: Path, layout: str) -> tuple[int, str]:
    """Exit code and output of `ray job submit`, which waits for the job."""
    command = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "pipelines/full.py"]
    done = subprocess.run(
        [*command, *pipeline(root, corpus, layout)],
        env=cluster,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def root(cluster: dict[str, str], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a job left."""
    folder = tmp_path_factory.mktemp("root")
    code, output = submit(cluster, folder, corpus, "obelics")
    assert code == 0, output
    return folder


def test_a_job_leaves_its_record_where_others_find_it(cluster, corpus: Path, root: Path, command) -> None:
    (path,) = root.glob("corpus/*/record.json")
    record = json.loads(path.read_text())
    assert record["result"]["documents"] == 2 and record["result"]["rejected"] == {}
    assert (root / "latest" / "corpus").resolve() == path.parent
    assert uploaded_mb(cluster) < 10
    assert re.search(r"skip +corpus", command(*pipeline(root, corpus, "obelics"), "--dry-run").output)


@pytest.mark.slow
def test_the_same_job_skips(cluster, corpus: Path, root: Path) -> None:
    (path,) = root.glob("corpus/*/record.json")
    record = path.read_bytes()
    code, output = submit(cluster, root, corpus, "obelics")
    assert code == 0, output
    assert re.search(r"skip +corpus", output)
    assert path.read_bytes() == record


@pytest.mark.slow
def test_a_job_whose_step_fails_fails(cluster, corpus: Path, tmp_path: Path) -> None:
    code, output = submit(cluster, tmp_path, corpus, "moca")  # a layout with other columns
    assert code != 0
    assert "step corpus failed" in output
    assert not list(tmp_path.glob("corpus/*/record.json"))


def test_without_the_token_nobody_submits(cluster, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster['RAY_API_SERVER_ADDRESS']}/api/jobs/", timeout=10)
    code, _ = submit(cluster | {"RAY_AUTH_TOKEN": "0" * 64}, tmp_path, corpus, "obelics")
    assert code != 0 and not list(tmp_path.iterdir())


def uploaded_mb(cluster: dict[str, str]) -> float:
    """What came of the working directory: .gitignore keeps runs and caches out of it, Ray itself .git and .venv."""
    (folder,) = Path(cluster["RAY_TMPDIR"]).glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*[!k]")
    names = {path.name for path in folder.iterdir()}
    assert {"pipelines", "cluster", "moca_core"} <= names and not names & {".git", ".venv", "runs"}
    return sum(path.stat().st_size for path in folder.rglob("*")) / 1e6
