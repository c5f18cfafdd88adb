"""Artifacts on a local folder or on s3://, through one small set of functions.

A URI is a local path (absolute or relative, or file://...) or s3://bucket/key. S3 takes its endpoint and credentials
from the usual AWS_* environment variables, AWS_ENDPOINT_URL included. Every other scheme is a ValueError.
"""

import contextlib
import glob as globbing
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs as pafs

_UNFINISHED = ".unfinished-"  # names that start so are files in the making, invisible to every reader
_EDGE_BYTES = 64 * 1024


def is_local(uri: str) -> bool:
    """True for a path or file://, False for s3://. Raises ValueError for any other scheme."""
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme == "file":
        return True
    if scheme != "s3":
        raise ValueError(f"unknown storage {uri!r}: a local path or s3://bucket/key is needed")
    return False


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` below it, on both kinds of storage."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow file system of `uri`, and the path on it (an absolute path, or "bucket/key")."""
    if is_local(uri):
        return pafs.LocalFileSystem(), _local(uri)
    return pafs.PyFileSystem(pafs.FSSpecHandler(_s3())), _key(uri)


def exists(uri: str) -> bool:
    """Whether there is a file or a folder at `uri` (on S3 a folder is a prefix that holds something)."""
    return os.path.exists(_local(uri)) if is_local(uri) else _s3().exists(_key(uri))


def read_bytes(uri: str) -> bytes:
    """The content of one file. Raises FileNotFoundError if it is not there."""
    return Path(_local(uri)).read_bytes() if is_local(uri) else _s3().cat_file(_key(uri))


def write_atomic(uri: str, data: bytes) -> None:
    """Write one file so that a reader sees all of `data` or what was there before, whenever this process dies."""
    if not is_local(uri):
        _s3().pipe_file(_key(uri), data)  # one PUT (or a multipart upload that only its last call makes visible)
        return
    target = Path(_local(uri))
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{_UNFINISHED}{uuid.uuid4().hex}")
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


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
        root = _key(uri)
        for path, info in _s3().find(root, detail=True).items():
            if info["type"] == "file" and not path.endswith("/"):  # some tools put empty "folder/" keys
                found.append((path.removeprefix(root).lstrip("/") or PurePosixPath(path).name, info["size"]))
    return sorted((path, size) for path, size in found if not PurePosixPath(path).name.startswith(_UNFINISHED))


def delete(uri: str) -> None:
    """Remove a file, or a folder with all that is in it. Nothing there is fine."""
    if not is_local(uri):
        storage, key = _s3(), _key(uri)
        if storage.exists(key):
            storage.rm(key, recursive=True)
    elif os.path.isdir(_local(uri)) and not os.path.islink(_local(uri)):
        shutil.rmtree(_local(uri))
    else:
        Path(_local(uri)).unlink(missing_ok=True)


def upload(local_dir: str, uri: str) -> None:
    """Copy everything below a local folder to below `uri`. Not atomic: write a marker last with `write_atomic`."""
    if is_local(uri):
        shutil.copytree(local_dir, _local(uri), dirs_exist_ok=True)
        return
    names = [name for name, _ in list_files(local_dir)]
    _s3().put([os.path.join(local_dir, name) for name in names], [f"{_key(uri)}/{name}" for name in names])


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
    storage, root = _s3(), _key(uri)
    single = storage.isfile(root)
    # The ETag tells apart two contents of the same size at the same place.
    tags = sorted((path, info.get("ETag", "")) for path, info in storage.find(root, detail=True).items())
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
            with tempfile.TemporaryDirectory(dir=cache, prefix=_UNFINISHED) as unfinished:
                work = os.path.join(unfinished, "content")
                os.mkdir(work)
                build(work)
                os.rename(work, final)
    return str(final)


def digest(uri: str) -> str:
    """64 hex digits that identify data a user brought: one file, a folder, or a glob, wherever it lies.

    Hashes the sorted (path relative to the folder, size, first and last 64 KiB) of the files. Moving or copying a
    folder as a whole keeps the digest; renaming or changing a file in it does not (but a change of the same length
    deep inside a large file goes unseen). Raises ValueError if nothing is there.
    """
    storage = _fsspec(uri)
    root = _local(uri) if is_local(uri) else _key(uri)
    if not exists(uri) and globbing.has_magic(root):
        paths = sorted(path for path in storage.glob(root) if storage.isfile(path))
        literal = root[: next(i for i, character in enumerate(root) if character in "*?[")]
        names = [path.removeprefix(literal[: literal.rfind("/") + 1]) for path in paths]
    else:
        names = [name for name, _ in list_files(uri)]
        paths = [root] if storage.isfile(root) else [f"{root}/{name}" for name in names]
    if not paths:
        raise ValueError(
            f"no data at {uri!r}: a file, a folder with files in it, or a glob that matches files is needed"
        )

    def fingerprint(name: str, path: str) -> bytes:
        size = storage.size(path)
        edges = hashlib.sha256(storage.cat_file(path, start=0, end=min(size, _EDGE_BYTES)))
        if size > _EDGE_BYTES:
            edges.update(storage.cat_file(path, start=max(_EDGE_BYTES, size - _EDGE_BYTES), end=size))
        return f"{name}\0{size}\0{edges.hexdigest()}\n".encode()

    with ThreadPoolExecutor(16) as threads:  # on S3 a request is all waiting
        lines = list(threads.map(fingerprint, names, paths))
    return hashlib.sha256(b"".join(sorted(lines))).hexdigest()


def _local(uri: str) -> str:
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


def _key(uri: str) -> str:
    return uri.removeprefix("s3://").rstrip("/")


def _fsspec(uri: str) -> Any:
    import fsspec

    return fsspec.filesystem("file") if is_local(uri) else _s3()


def _s3() -> Any:
    import s3fs

    # The endpoint is an argument because fsspec reuses instances by argument. No listing cache: other processes write
    # here too.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return s3fs.S3FileSystem(endpoint_url=endpoint, use_listings_cache=False)
