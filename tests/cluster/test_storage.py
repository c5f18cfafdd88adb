"""The same behaviour on a local folder and on S3 (a moto server on loopback)."""

import multiprocessing
import os
import pickle
import threading
import time
from pathlib import Path

import pytest

from cluster import storage


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place; different for every test."""
    if request.param == "local":
        return str(tmp_path / "root")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOCA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(root: str, big: bytes = b"x" * 200_000) -> None:
    storage.write_atomic(storage.join(root, "b", "two.bin"), big)
    storage.write_atomic(storage.join(root, "one.txt"), b"one")


def test_write_read_list_delete(root: str) -> None:
    assert not storage.exists(root)
    assert storage.list_files(root) == []
    fill(root)
    assert storage.list_files(root) == [("b/two.bin", 200_000), ("one.txt", 3)]
    assert storage.list_files(storage.join(root, "one.txt")) == [("one.txt", 3)]
    assert storage.read_bytes(storage.join(root, "one.txt")) == b"one"
    storage.write_atomic(storage.join(root, "one.txt"), b"another")
    assert storage.read_bytes(storage.join(root, "one.txt")) == b"another"
    assert storage.exists(storage.join(root, "b")) and storage.exists(storage.join(root, "one.txt"))
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "three"))
    storage.delete(storage.join(root, "b"))
    assert storage.list_files(root) == [("one.txt", 7)]
    storage.delete(storage.join(root, "one.txt"))
    storage.delete(storage.join(root, "never-was"))
    assert storage.list_files(root) == []


def test_arrow_reads_and_writes_there(root: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fill(root)
    filesystem, path = pickle.loads(pickle.dumps(storage.filesystem(root)))  # noqa: S301  Ray sends it to its workers
    pq.write_table(pa.table({"a": [1, 2]}), f"{path}/t.parquet", filesystem=filesystem)
    assert pq.read_table(f"{path}/t.parquet", filesystem=filesystem)["a"].to_pylist() == [1, 2]
    assert "t.parquet" in dict(storage.list_files(root))


def test_upload_then_localize(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "a").write_bytes(b"aa")
    (source / "b").write_bytes(b"b")
    storage.upload(str(source), root)
    local = Path(storage.localize(root))
    assert (local / "deep" / "a").read_bytes() == b"aa" and (local / "b").read_bytes() == b"b"
    assert storage.localize(root) == str(local)
    storage.write_atomic(storage.join(root, "b"), b"c")  # as long as before
    assert (Path(storage.localize(root)) / "b").read_bytes() == b"c"
    assert Path(storage.localize(storage.join(root, "b"))).read_bytes() == b"c"


def test_upload_takes_what_the_digest_is_of(root: str, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    kept = [".gitattributes", "model.safetensors", "nested/config.json"]
    for name in (*kept, ".git/lfs/objects/model", "nested/.git", ".cache/huggingface/model.metadata"):
        storage.write_atomic(str(clone / name), name.encode())
    storage.upload(str(clone), root)
    assert [name for name, _ in storage.list_files(root)] == kept
    assert storage.digest(root) == storage.digest(str(clone))


def test_localize_downloads_once(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(f"{s3}/once")
    downloads = []
    client, path = storage._fsspec(f"{s3}/once")
    get = client.get
    monkeypatch.setattr(client, "get", lambda *paths: (downloads.append(paths), get(*paths)))
    monkeypatch.setattr(storage, "_fsspec", lambda uri: (client, path))
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(storage.localize(f"{s3}/once"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4
    assert len(downloads) == 1


def test_localize_nothing(s3: str) -> None:
    with pytest.raises(FileNotFoundError, match="s3://bucket/nothing"):
        storage.localize(f"{s3}/nothing")


def test_a_failed_build_leaves_nothing(cache: Path) -> None:
    def fail(folder: str) -> None:
        Path(folder, "half").write_text("half")
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="network"):
        storage.build_once("key", fail)
    assert not (cache / "key").exists()
    assert os.listdir(storage.build_once("key", lambda folder: Path(folder, "all").touch())) == ["all"]


def test_digest_says_what_not_where(root: str, tmp_path: Path) -> None:
    fill(root)
    first = storage.digest(root)
    copy = str(tmp_path / "elsewhere" / "copy")
    fill(copy)
    assert storage.digest(copy) == first  # also across local and S3
    assert storage.digest(root + "/") == first
    storage.write_atomic(storage.join(root, "one.txt"), b"eno")
    assert storage.digest(root) != first


@pytest.mark.parametrize("changed", [0, 70_000 - 65_536, 65_535, 69_999])
def test_digest_sees_both_ends_of_a_file(root: str, changed: int) -> None:
    content = bytearray(70_000)
    file = storage.join(root, "file")
    storage.write_atomic(file, bytes(content))
    before = storage.digest(file)
    content[changed] = 1
    storage.write_atomic(file, bytes(content))
    assert storage.digest(file) != before


def test_digest_sees_every_byte_of_a_little_data(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(root)
    before = storage.digest(root)
    storage.write_atomic(storage.join(root, "b", "two.bin"), b"x" * 100_000 + b"y" + b"x" * 99_999)
    assert storage.digest(root) != before
    monkeypatch.setattr(storage, "_WHOLE_BYTES", 200_000)
    other = storage.digest(root)
    fill(root)
    assert storage.digest(root) == other  # of more only the edges


def test_digest_sees_many_small_files_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rewrite(byte: bytes) -> str:
        for number in range(2001):
            (tmp_path / f"{number}.txt").write_bytes(byte * 1500)
        return storage.digest(str(tmp_path))

    assert rewrite(b"a") != rewrite(b"b")
    monkeypatch.setattr(storage, "_WHOLE_BYTES", 2000 * storage._FILE_BYTES)
    assert rewrite(b"a") == rewrite(b"b")  # of more only names and sizes


def test_digest_of_a_glob(root: str) -> None:
    fill(root)
    storage.write_atomic(storage.join(root, "b", "three.txt"), b"3")
    texts = storage.digest(storage.join(root, "**", "*.txt"))
    storage.write_atomic(storage.join(root, "b", "two.bin"), b"not a text")
    assert storage.digest(storage.join(root, "**", "*.txt")) == texts
    storage.write_atomic(storage.join(root, "b", "three.txt"), b"4")
    assert storage.digest(storage.join(root, "**", "*.txt")) != texts


def test_digest_of_a_renamed_file_differs(root: str) -> None:
    storage.write_atomic(storage.join(root, "x", "a"), b"same")
    storage.write_atomic(storage.join(root, "y", "b"), b"same")
    assert storage.digest(storage.join(root, "x")) != storage.digest(storage.join(root, "y"))


def test_digest_of_a_glob_follows_links_as_a_folder_does(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_text("content")
    for folder in ("links", "files"):
        (tmp_path / folder).mkdir()
    (tmp_path / "links" / "a.txt").symlink_to("../blobs/abc")
    (tmp_path / "files" / "a.txt").write_text("content")
    assert storage.digest(str(tmp_path / "links/*.txt")) == storage.digest(str(tmp_path / "files/*.txt"))


def test_digest_refuses_pointers_to_content_that_is_elsewhere(root: str) -> None:
    fill(root)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    storage.write_atomic(storage.join(root, "b", "three.parquet"), pointer)
    for uri in (
        root,
        storage.join(root, "b"),
        storage.join(root, "b/*.parquet"),
        storage.join(root, "b/three.parquet"),
    ):
        with pytest.raises(ValueError, match=r"three\.parquet in .*git lfs pull"):
            storage.digest(uri)
    assert storage.digest(storage.join(root, "b/*.bin"))
    storage.write_atomic(storage.join(root, "b", "three.parquet"), pointer + bytes(2000))  # only begins like one
    assert storage.digest(root)


def test_digest_does_not_see_what_git_keeps_beside_a_clone(root: str) -> None:
    fill(root)
    before = storage.digest(root)
    storage.write_atomic(storage.join(root, ".git", "index"), b"changes with every command")
    storage.write_atomic(storage.join(root, ".cache", "huggingface", "download", "one.txt.metadata"), b"a time")
    assert storage.digest(root) == before
    storage.write_atomic(storage.join(root, ".gitattributes"), b"*.parquet filter=lfs")
    assert storage.digest(root) != before


def test_digest_of_nothing_names_it(root: str) -> None:
    with pytest.raises(ValueError, match=r"no data at .*missing/\*\.jsonl"):
        storage.digest(storage.join(root, "missing/*.jsonl"))
    with pytest.raises(ValueError, match="no data at"):
        storage.digest(root)


def test_a_literal_bracket_is_no_glob(tmp_path: Path) -> None:
    (tmp_path / "data[1]").mkdir()
    (tmp_path / "data[1]" / "a").write_text("a")
    assert len(storage.digest(str(tmp_path / "data[1]"))) == 64


def _write_for_ever(file: str) -> None:
    while True:
        storage.write_atomic(file, b"y" * 3_000_000)


def test_nobody_sees_half_a_file(tmp_path: Path) -> None:
    file = str(tmp_path / "folder" / "file")
    storage.write_atomic(file, b"y")
    writer = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(file,))
    writer.start()
    while os.path.getsize(file) == 1:
        pass
    stop = time.monotonic() + 0.3
    seen = set()
    while time.monotonic() < stop:
        seen.add(os.path.getsize(file))
        assert [name for name, _ in storage.list_files(str(tmp_path / "folder"))] == ["file"]
    writer.kill()
    writer.join()
    seen.add(os.path.getsize(file))
    assert seen == {3_000_000}


def test_a_writer_appears_at_its_end_or_not_at_all(root: str) -> None:
    file = storage.join(root, "file")
    with storage.open_writer(file) as writer:
        writer.write(b"first ")
        writer.write(b"second")
        assert not storage.exists(file) and storage.list_files(root) == []
    assert storage.read_bytes(file) == b"first second"
    with pytest.raises(KeyboardInterrupt), storage.open_writer(file) as writer:
        writer.write(b"third")
        raise KeyboardInterrupt
    assert storage.read_bytes(file) == b"first second"
    assert storage.list_files(root) == [("file", 12)]
    with storage.open_writer(file):
        pass
    assert storage.read_bytes(file) == b""


def test_unknown_scheme_is_named() -> None:
    for call in (storage.filesystem, storage.exists, storage.is_local, storage.digest, storage.list_files):
        with pytest.raises(ValueError, match="gs://bucket/x"):
            call("gs://bucket/x")


def test_what_lies_within_a_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for uri, folder in (
        (f"{tmp_path}/a/v.npy", f"file://{tmp_path}/a/"),
        (f"file://{tmp_path}/link/v.npy", f"{tmp_path}/a"),
        (f"{tmp_path}/a", f"{tmp_path}/b/../a"),
        ("s3://pages/a/v.npy", "s3://pages/a/"),
        ("s3://pages/v.npy", "s3://pages"),
    ):
        assert storage.is_within(uri, folder)
    for uri, folder in (
        (f"{tmp_path}/ab/v.npy", f"{tmp_path}/a"),
        ("s3://pages/ab/v.npy", "s3://pages/a"),
        (f"{tmp_path}/a/v.npy", "s3://pages/a"),
        ("s3://pages/a/v.npy", "/"),
        ("s3://pages/a/v.npy", "hf://datasets/pages/a"),
    ):
        assert not storage.is_within(uri, folder)


def test_forms_of_a_local_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    for uri in ("data", f"{tmp_path}/data/", f"file://{tmp_path}/data"):
        assert storage.localize(uri) == str(tmp_path / "data")
        assert len(storage.list_files(uri)) == 2
        assert storage.is_local(uri)
    assert storage.join("s3://bucket/a/", "b", "/c/") == "s3://bucket/a/b/c"
