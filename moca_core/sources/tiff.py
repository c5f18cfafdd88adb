"""The frames of a TIFF as images of their own: MINT-1T keeps all pictures of a PDF in one file."""

import io
import struct

from moca_core.data.image_files import ImageBounds, ImageError, decode
from moca_core.sources.fields import BadRow


def frames(data: bytes, count: int) -> list[bytes]:
    """The first `count` frames: the file itself where it has but one, else PNGs. Raises BadRow where there are fewer, or a broken one."""
    starts = _starts(data, count + 1)
    if len(starts) < count:
        raise BadRow("too_few_images", f"{count} images of a TIFF with {len(starts)} frames")
    if len(starts) == 1:
        return [data][:count]
    return [_png(_opened_at(data, start)) for start in starts[:count]]


def _starts(data: bytes, most: int) -> list[int]:
    """Where the directories of frames lie, as they are chained: at most so many, and none twice."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None or len(data) < 8:
        raise BadRow("not_an_image", f"no TIFF: first bytes {data[:8]!r}")
    starts: list[int] = []
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    while start and start not in starts and len(starts) < most:
        starts.append(start)
        try:
            (entries,) = struct.unpack_from(f"{order}H", data, start)
            (start,) = struct.unpack_from(f"{order}I", data, start + 2 + 12 * entries)
        except struct.error as error:
            raise BadRow("image_truncated", f"directory of a TIFF: {error}") from None
    return starts


def _opened_at(data: bytes, start: int) -> bytes:
    """The same file with another first frame: decoding it is bounded as for any image."""
    return data[:4] + struct.pack("<I" if data[:2] == b"II" else ">I", start) + data[8:]


def _png(data: bytes) -> bytes:
    try:
        image = decode(data, ImageBounds(max_bytes=len(data)))
    except ImageError as error:
        raise BadRow(error.reason, error.detail) from None
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()
