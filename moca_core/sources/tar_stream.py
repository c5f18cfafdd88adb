"""The files of a tar, read as a stream and never extracted: sizes are judged before a byte is held.

Not the standard library's reader: that one ends in silence at a broken header, and holds extended headers of any size.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass

from moca_core.sources.fields import BadRow

BLOCK = 512
MAX_EXTENSION_BYTES = 2**20  # of a long name or a pax header
SKIP_BYTES = 2**20


@dataclass(frozen=True)
class Member:
    """A file of a tar; `data` is None for one that is not read, and `unread` says why."""

    name: str
    data: bytes | None
    unread: str = ""


def members(stream: io.BufferedIOBase, max_bytes: int) -> Iterator[Member]:
    """Files in order; links, devices, sparse files and files of more than `max_bytes` without their data. Raises BadRow."""
    long_name, extended = "", {}
    while any(header := _exactly(stream, BLOCK)):
        _check(header)
        kind, size = header[156:157], _number(header[124:136])
        if kind in (b"x", b"g", b"L", b"K"):
            if size > MAX_EXTENSION_BYTES:
                raise BadRow("unreadable_file", f"an extended header of {size} bytes, at most {MAX_EXTENSION_BYTES}")
            data = _exactly(stream, _padded(size))[:size]
            long_name = _text(data) if kind == b"L" else long_name
            extended = _pax(data) if kind == b"x" else extended
            continue
        if kind == b"S":
            _skip_sparse_map(stream, header)
        size = int(extended["size"]) if extended.get("size", "").isdecimal() else size
        name = extended.get("path") or long_name or _name(header)
        if any(key.startswith("GNU.sparse") for key in extended):
            kind = b"S"
        if kind in (b"0", b"\0", b"7") and size <= max_bytes:
            yield Member(name, _exactly(stream, _padded(size))[:size])
        else:
            _skip(stream, _padded(size))
            if kind != b"5":
                too_large = kind in (b"0", b"\0", b"7")
                yield Member(
                    name, None, f"{size} bytes, at most {max_bytes}" if too_large else f"no file: type {kind!r}"
                )
        long_name, extended = "", {}
    while rest := stream.read(SKIP_BYTES):
        if any(rest):
            raise BadRow("unreadable_file", "there is more behind the end mark of the archive")


def _exactly(stream: io.BufferedIOBase, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise BadRow("unreadable_file", "the archive ends before its end mark")
    return data


def _skip(stream: io.BufferedIOBase, size: int) -> None:
    while size > 0:
        size -= len(_exactly(stream, min(size, SKIP_BYTES)))


def _skip_sparse_map(stream: io.BufferedIOBase, header: bytes) -> None:
    more = header[482]
    while more:
        more = _exactly(stream, BLOCK)[504]


def _padded(size: int) -> int:
    return -size % BLOCK + size


def _check(header: bytes) -> None:
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != _number(header[148:156]):
        raise BadRow("unreadable_file", f"no tar header: {header[:16]!r}")


def _number(field: bytes) -> int:
    """Octal digits, or base 256 where the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0")[0].strip() or b"0"
    if digits.strip(b"01234567"):
        raise BadRow("unreadable_file", f"no octal number: {field!r}")
    return int(digits, 8)


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _pax(data: bytes) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n", of which LENGTH counts all. Raises BadRow."""
    records, at = {}, 0
    while at < len(data) and data[at]:
        length, space, _ = data[at : at + 20].partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length) + 1:
            raise BadRow("unreadable_file", f"no pax record: {data[at : at + 20]!r}")
        key, _, value = data[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
        records[_text(key)] = _text(value)
        at += int(length)
    return records


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "replace")
