"""Datasets of a Hugging Face Hub: a small server on loopback that knows one, with real rows."""

import json
import pickle
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pyarrow.parquet as pq
import pytest

from cluster import storage

ROWS = Path(__file__).parents[3] / "shared" / "data" / "kicad" / "interleaved" / "part-00000.parquet"
SHA, BRANCH_SHA = "a" * 40, "b" * 40
REVISIONS = {"main": SHA, SHA: SHA, "small": BRANCH_SHA, BRANCH_SHA: BRANCH_SHA}

pytestmark = pytest.mark.skipif(not ROWS.exists(), reason="the rows that it serves are not here")


class FakeHub(ThreadingHTTPServer):
    """owner/manuals with two files on main, and one on the branch small."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        data, readme = ROWS.read_bytes(), b"# Manuals\n"
        self.files = {SHA: {"README.md": readme, "data/part-0.parquet": data}, BRANCH_SHA: {"README.md": readme}}
        self.sent, self.ranges = Counter[str](), Counter[str]()  # bytes, and requests for a range, of a file


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        prefix, parts = (parts[:2], parts[2:]) if parts[0] == "api" else (parts[:1], parts[1:])
        if prefix[-1] != "datasets" or parts[:2] != ["owner", "manuals"]:
            return self._fail("RepoNotFound")
        action = parts[2] if len(parts) > 2 else "revision"
        revision, path = parts[3] if len(parts) > 3 else "main", "/".join(parts[4:])
        if revision not in REVISIONS:
            return self._fail("RevisionNotFound")
        sha = REVISIONS[revision]
        if action == "revision":
            return self._send(json.dumps({"id": "owner/manuals", "sha": sha}).encode())
        if action == "tree":
            return self._tree(sha, path, "recursive=true" in url.query.lower())
        return self._resolve(sha, path)

    do_HEAD = do_GET

    def _tree(self, sha: str, folder: str, recursive: bool) -> None:
        entries = {}
        for name, content in self.server.files[sha].items():
            below = name.removeprefix(f"{folder}/" if folder else "")
            if folder and below == name:
                continue
            head, _, rest = below.partition("/")
            parent = f"{folder}/{head}" if folder else head
            if rest:
                entries[parent] = {"type": "directory", "path": parent, "oid": "t", "size": 0}
            if recursive or not rest:
                entries[name] = {"type": "file", "path": name, "oid": f"{len(content)}", "size": len(content)}
        return self._send(json.dumps(list(entries.values())).encode()) if entries else self._fail("EntryNotFound")

    def _resolve(self, sha: str, path: str) -> None:
        content = self.server.files[sha].get(path)
        if content is None:
            return self._fail("EntryNotFound")
        headers = {"ETag": f'"{len(content)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        first, last, status = 0, len(content) - 1, 200
        if asked := self.headers.get("Range"):
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            self.server.ranges[path] += 1
            first, last, status = int(begin), min(int(end or last), last), 206
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        if self.command == "GET":
            self.server.sent[path] += last + 1 - first
        return self._send(content[first : last + 1], status, headers)

    def _fail(self, code: str) -> None:
        self._send(b"{}", 404, {"X-Error-Code": code})

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    server = FakeHub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("MOCA_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("start", ["hf://datasets/owner/manuals", "hf://owner/manuals", "hf://owner/manuals@main"])
def test_a_dataset_is_read_as_any_folder(hub: FakeHub, start: str) -> None:
    size = ROWS.stat().st_size
    assert not storage.is_local(start)
    assert storage.list_files(start) == [("README.md", 10), ("data/part-0.parquet", size)]
    assert storage.list_files(f"{start}/data") == [("part-0.parquet", size)]
    assert storage.exists(f"{start}/data") and not storage.exists(f"{start}/nothing")
    assert storage.read_bytes(f"{start}/README.md") == b"# Manuals\n"
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{start}/nothing")


def test_rows_are_read_by_range(hub: FakeHub) -> None:
    uri = "hf://owner/manuals/data/part-0.parquet"
    fs, path = pickle.loads(pickle.dumps(storage.filesystem(uri)))  # noqa: S301  Ray sends it to its workers
    with fs.open_input_file(path) as source:
        footer = pq.ParquetFile(source).metadata
        assert footer == pq.read_metadata(ROWS)
    assert hub.ranges["data/part-0.parquet"]
    assert pq.read_table(path, filesystem=fs).equals(pq.read_table(ROWS))


def test_localize_copies_a_folder_once(hub: FakeHub) -> None:
    folder = Path(storage.localize("hf://owner/manuals"))
    assert (folder / "data" / "part-0.parquet").read_bytes() == ROWS.read_bytes()
    assert (folder / "README.md").read_bytes() == b"# Manuals\n"
    sent = hub.sent.copy()
    assert storage.localize("hf://owner/manuals") == str(folder) and hub.sent == sent
    assert Path(storage.localize("hf://owner/manuals@small/README.md")).read_bytes() == b"# Manuals\n"


def test_digest_is_the_commit_and_the_path(hub: FakeHub) -> None:
    whole = storage.digest("hf://owner/manuals")
    assert len(whole) == 64
    for same in ("hf://datasets/owner/manuals/", "hf://owner/manuals@main", f"hf://owner/manuals@{SHA}"):
        assert storage.digest(same) == whole
    others = ["hf://owner/manuals@small", "hf://owner/manuals/data", "hf://owner/manuals/data/*.parquet"]
    assert len({whole, *map(storage.digest, others)}) == 4
    assert not hub.sent  # nothing was read
    for missing in ("hf://owner/manuals/nothing", "hf://owner/manuals/*.json", "hf://owner/manuals@small/data"):
        with pytest.raises(ValueError, match="no data at"):
            storage.digest(missing)


READERS = [storage.exists, storage.read_bytes, storage.list_files, storage.localize, storage.digest]


@pytest.mark.parametrize("call", READERS)
def test_a_name_that_does_not_exist_is_a_value_error(hub: FakeHub, call) -> None:
    with pytest.raises(ValueError, match=r"hf://owner/nothing.*no dataset 'owner/nothing' on http"):
        call("hf://owner/nothing/data")
    with pytest.raises(ValueError, match="owner/manuals has no branch, tag or commit 'v9'"):
        call("hf://owner/manuals@v9")


@pytest.mark.parametrize("call", READERS)
def test_without_network_the_way_out_is_named(hub: FakeHub, call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9 does not answer.*local clone"):
        call("hf://owner/manuals")


def test_offline_is_named(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()  # its client looked at the setting when it was made
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set: unset it, or use a local clone"):
        storage.digest("hf://owner/manuals")
    close_session()


@pytest.mark.parametrize(
    "uri", ["hf://", "hf://manuals", "hf://datasets/manuals", "hf://spaces/a/b", "hf://@main/x", "hf://a/@main"]
)
def test_what_is_no_dataset_is_named(uri: str) -> None:
    with pytest.raises(ValueError, match="hf://datasets/OWNER/NAME"):
        storage.filesystem(uri)


def test_the_hub_is_read_only(tmp_path: Path) -> None:
    uri = "hf://owner/manuals/new"

    def write(uri: str) -> None:
        with storage.open_writer(uri):
            pass

    for call in (write, storage.delete, lambda u: storage.write_atomic(u, b""), lambda u: storage.upload(tmp_path, u)):
        with pytest.raises(ValueError, match="read only"):
            call(uri)
