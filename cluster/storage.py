"""Artifacts on a local folder or on s3://, and sources on hf:// too, through one small set of functions.

A URI is a local path (absolute or relative, or file://...), s3://bucket/key, or hf://datasets/OWNER/NAME[@REVISION][/PATH]
on the Hugging Face Hub, which is read only. S3 takes its endpoint and credentials from the usual AWS_* environment
variables, AWS_ENDPOINT_URL included, and repeats what fails in passing (cluster/s3.py). Every other scheme is a ValueError.
"""

import contextlib
import glob as globbing
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow.fs as pafs

from cluster import hub

UNFINISHED = ".unfinished-"  # names that start so are files in the making, invisible to every reader
_WHOLE_BYTES = 64 * 2**20  # of data that a digest reads whole
_FILE_BYTES = 16 * 2**10  # what a file counts for at least: on S3 asking for it takes as long as reading this
_EDGE_BYTES = 64 * 2**10
_READ_FILES = 2000
_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
_LFS_BYTES = 1024  # pointers are shorter


def is_local(uri: str) -> bool:
    """True for a path or file://, False for s3:// and hf://. Raises ValueError for any other scheme."""
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme == "file":
        return True
    if scheme not in ("s3", "hf"):
        raise ValueError(
            f"unknown storage {uri!r}: a local path, s3://bucket/key or hf://datasets/OWNER/NAME is needed"
        )
    return False


def absolute(uri: str) -> str:
    """A local path (or file://) in full, ~ too; another URI as it is."""
    return _local(uri) if is_local(uri) else uri


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` below it, on every kind of storage."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def is_within(uri: str, folder: str) -> bool:
    """Whether `uri` is `folder` or lies below it, however both are written; local links are followed."""
    place, root = (Path(_local(name)).resolve() if is_local(name) else PurePosixPath(name) for name in (uri, folder))
    return place.is_relative_to(root)


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow file system of `uri`, and the path on it (an absolute path, "bucket/key", or "datasets/OWNER/NAME/...").

    Nothing is asked of the storage yet.
    """
    if is_local(uri):
        return pafs.LocalFileSystem(), _local(uri)
    storage, path = _fsspec(uri)
    return pafs.PyFileSystem(pafs.FSSpecHandler(storage)), path


def exists(uri: str) -> bool:
    """Whether there is a file or a folder at `uri` (on S3 a folder is a prefix that holds something).

    Raises ValueError for a Hub dataset that does not exist or cannot be reached, as all that read from the Hub do.
    """
    storage, path = _reach(uri)
    return storage.exists(path)


def read_bytes(uri: str) -> bytes:
    """The content of one file. Raises FileNotFoundError if it is not there."""
    storage, path = _reach(uri)
    return storage.cat_file(path)


@contextlib.contextmanager
def open_writer(uri: str) -> Iterator[BinaryIO]:
    """A binary file to write that appears under its name when the block ends well, and not at all otherwise.

    A reader sees all of it or what was there before, whenever this process dies. However large the file, only the last
    part of it is in memory. A killed process may leave an upload in parts behind, which nobody sees but which is paid
    for: give the bucket a rule that aborts incomplete uploads.
    """
    _check_writable(uri)
    if is_local(uri):
        writer = _local_writer(_local(uri))
    else:
        storage, path = _fsspec(uri)
        writer = storage.open_writer(path)
    with writer as file:
        yield file


def write_atomic(uri: str, data: bytes) -> None:
    """Write one file so that a reader sees all of `data` or what was there before, whenever this process dies."""
    with open_writer(uri) as file:
        file.write(data)


def list_files(uri: str) -> list[tuple[str, int]]:
    """(path relative to `uri`, size in bytes) of every file below a folder, sorted.

    A single file lists itself by its name; where nothing is, the list is empty.
    """
    found: list[tuple[str, int]] = []
    if is_local(uri):
        root = _local(uri)
        if os.path.isfile(root):
            return [(os.path.basename(root), os.path.getsize(root))]
        for folder, _, names in os.walk(root, followlinks=True):
            for name in names:
                path = os.path.join(folder, name)
                # A dangling link, or a file that went while we looked, is not there.
                with contextlib.suppress(FileNotFoundError):
                    found.append((os.path.relpath(path, root), os.stat(path).st_size))
    else:
        storage, root = _reach(uri)
        for path, info in storage.find(root, detail=True).items():
            if info["type"] == "file" and not path.endswith("/"):  # some tools put empty "folder/" keys
                found.append((path.removeprefix(root).lstrip("/") or PurePosixPath(path).name, info["size"]))
    return sorted((path, size) for path, size in found if not PurePosixPath(path).name.startswith(UNFINISHED))


def delete(uri: str) -> None:
    """Remove a file, or a folder with all that is in it. Nothing there is fine."""
    _check_writable(uri)
    if not is_local(uri):
        storage, path = _fsspec(uri)
        if storage.exists(path):
            storage.rm(path, recursive=True)
    elif os.path.isdir(_local(uri)) and not os.path.islink(_local(uri)):
        shutil.rmtree(_local(uri))
    else:
        Path(_local(uri)).unlink(missing_ok=True)


def upload(local_dir: str, uri: str) -> None:
    """Copy what is below a local folder to below `uri`, without what `digest` does not look at: the .git of a clone holds its
    weights a second time. Not atomic: write a marker last with `write_atomic`.
    """
    _check_writable(uri)
    if is_local(uri):
        shutil.copytree(local_dir, _local(uri), dirs_exist_ok=True, ignore=_bookkeeping)
        return
    storage, path = _fsspec(uri)
    names = [name for name, _ in list_files(local_dir) if not _is_bookkeeping(name)]
    sources, targets = [os.path.join(local_dir, name) for name in names], [f"{path}/{name}" for name in names]
    # Up to two parts of each of eight files are in memory.
    storage.put(sources, targets, batch_size=8, chunksize=storage.default_block_size)


def localize(uri: str) -> str:
    """A local path with the content of `uri`: itself when local, else a copy that the processes of a node share.

    The copy lies under $MOCA_CACHE (default ~/.cache/moca) under a name made from the URI and its listing, so changed
    content gets a new copy. It is there completely or not at all. Read only, please. Raises FileNotFoundError if
    there is nothing at `uri`.
    """
    if is_local(uri):
        return _local(uri)
    listing = list_files(uri)
    if not listing:
        raise FileNotFoundError(f"nothing at {uri}")
    storage, root = _fsspec(uri)
    single = storage.isfile(root)
    # ETag or blob_id tell apart two contents of the same size at the same place.
    found = storage.find(root, detail=True).items()
    tags = sorted((path, info.get("ETag") or info.get("blob_id") or "") for path, info in found)
    key = hashlib.sha256(repr((uri, listing, tags)).encode()).hexdigest()[:32]

    def download(folder: str) -> None:
        targets = [os.path.join(folder, name) for name, _ in listing]
        for target in targets:
            os.makedirs(os.path.dirname(target), exist_ok=True)
        storage.get([root] if single else [f"{root}/{name}" for name, _ in listing], targets)

    folder = build_once(key, download)
    return os.path.join(folder, listing[0][0]) if single else folder


def build_once(key: str, build: Callable[[str], None]) -> str:
    """The folder `key` of this node's cache, filled by `build(folder)` unless it exists already.

    Safe among processes and threads: one builds, the others wait; a build that fails or dies leaves nothing under
    that name.
    """
    from filelock import FileLock

    cache = Path(os.environ.get("MOCA_CACHE") or Path.home() / ".cache" / "moca")
    cache.mkdir(parents=True, exist_ok=True)
    final = cache / key
    with FileLock(cache / f"{key}.lock"):
        if not final.exists():
            with tempfile.TemporaryDirectory(dir=cache, prefix=UNFINISHED) as unfinished:
                work = os.path.join(unfinished, "content")
                os.mkdir(work)
                build(work)
                os.rename(work, final)
    return str(final)


def digest(uri: str) -> str:
    """64 hex digits that identify data a user brought: one file, a folder, or a glob, wherever it lies.

    Hashes the sorted (path relative to the folder, size, content) of the files. Moving or copying a folder as a whole
    keeps the digest; renaming or changing a file in it does not. Of more than `_WHOLE_BYTES` the content is the first
    and last 64 KiB of each file (a change of the same length between them goes unseen), and if those are more than
    `_READ_FILES` files only names and sizes are looked at: a folder of millions of images would take hours. What git
    and the Hub's client keep beside a clone (.git, .cache) is not looked at. Of a Hub dataset the commit and the path
    in it say the same, and nothing is read. Raises ValueError if nothing is there, or a file is but the Git LFS
    pointer to its content.
    """
    if uri.startswith(hub.SCHEME):
        return hub.digest(uri)
    storage, root = _fsspec(uri)
    files = _named_files(storage, uri, root)
    if not files:
        raise ValueError(
            f"no data at {uri!r}: a file, a folder with files in it, or a glob that matches files is needed"
        )

    whole = sum(max(size, _FILE_BYTES) for _, _, size in files) <= _WHOLE_BYTES
    edge_bytes = _WHOLE_BYTES if whole else _EDGE_BYTES

    def fingerprint(file: tuple[str, str, int]) -> bytes:
        name, path, size = file
        if not whole and len(files) > _READ_FILES and size >= _LFS_BYTES:
            return f"{name}\0{size}\n".encode()
        first = storage.cat_file(path, start=0, end=min(size, edge_bytes))
        if size < _LFS_BYTES and first.startswith(_LFS_POINTER):
            raise ValueError(
                f"{name} in {uri!r} is a Git LFS pointer, not the data itself: run `git lfs pull` in the clone"
            )
        content = hashlib.sha256(first)
        if size > edge_bytes:
            content.update(storage.cat_file(path, start=max(edge_bytes, size - edge_bytes), end=size))
        return f"{name}\0{size}\0{content.hexdigest()}\n".encode()

    with ThreadPoolExecutor(16) as threads:  # on S3 a request is all waiting
        lines = list(threads.map(fingerprint, files))
    return hashlib.sha256(b"".join(sorted(lines))).hexdigest()


def _named_files(storage: Any, uri: str, root: str) -> list[tuple[str, str, int]]:
    """(name, path on `storage`, size) of the files of a folder, of a file, or of what a glob matches.

    Names are relative to the folder, or to the last folder of the glob without a wildcard.
    """
    if globbing.has_magic(root) and not storage.exists(root):
        literal = root[: next(i for i, character in enumerate(root) if character in "*?[")]
        folder = literal[: literal.rfind("/") + 1]
        found = storage.glob(root, detail=True).items()
        files = [(path.removeprefix(folder), path, info["size"]) for path, info in found if info["type"] != "directory"]
        files = [file for file in files if not is_local(uri) or os.path.isfile(file[1])]  # links count as "other"
    else:
        single = storage.isfile(root)
        files = [(name, root if single else f"{root}/{name}", size) for name, size in list_files(uri)]
    return [file for file in files if not _is_bookkeeping(file[0])]


def _bookkeeping(_: str, names: list[str]) -> list[str]:
    """Of the names in a folder: what `shutil.copytree` is to leave out."""
    return [name for name in names if _is_bookkeeping(name)]


def _is_bookkeeping(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return parts[-1].startswith(UNFINISHED) or not {".git", ".cache"}.isdisjoint(parts)


@contextlib.contextmanager
def _local_writer(path: str) -> Iterator[BinaryIO]:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def _check_writable(uri: str) -> None:
    if uri.startswith(hub.SCHEME):
        raise ValueError(
            f"{uri!r} is on the Hugging Face Hub, which is read only here: write to a local path or to s3://"
        )


def _local(uri: str) -> str:
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


def _fsspec(uri: str) -> tuple[Any, str]:
    """The fsspec file system of `uri` and the path on it."""
    if is_local(uri):
        import fsspec

        return fsspec.filesystem("file"), _local(uri)
    if uri.startswith(hub.SCHEME):
        return hub.filesystem(), hub.key(uri)
    from cluster import s3  # a second of imports that local runs do without

    return s3.filesystem(), uri.removeprefix("s3://").rstrip("/")


def _reach(uri: str) -> tuple[Any, str]:
    """As `_fsspec`, but the Hub is asked first: what HfFileSystem cannot reach it takes for missing."""
    if uri.startswith(hub.SCHEME):
        hub.commit(uri)
    return _fsspec(uri)
