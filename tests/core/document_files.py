"""Files of the layouts of documents, as the tools of the world write them, and what an adapter makes of them."""

import gzip
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from moca_core.sources import Location
from moca_core.types import Rejected

FS = pafs.LocalFileSystem()


def at(path, **options):
    return Location(FS, str(path), **options)


def read(adapter, location, function="read_unit"):
    return [item for unit in adapter.list_units(location) for item in getattr(adapter, function)(location, unit)]


def reasons(items):
    return [i.reason if isinstance(i, Rejected) else None for i in items]


def contents(items):
    assert not [i for i in items if isinstance(i, Rejected)], items
    return [item.content for item in items]


def mmc4_row(texts, *images, **changes):
    info = [{"image_name": n, "matched_text_index": i, "matched_sim": 0.3, "raw_url": "http://x/y"} for n, i in images]
    return {"text_list": texts, "image_info": info, "url": "http://x", "similarity_matrix": [[0.3]]} | changes


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def table(path, rows, schema=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, **options)
    return path


def lines(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def packed(data, extension, frames=1):
    """Compressed as .gz or .zst, in so many frames behind each other."""
    pack = gzip.compress if extension == ".gz" else lambda part: pa.compress(part, "zstd", asbytes=True)
    size = -(-len(data) // frames)
    return b"".join(pack(data[start : start + size]) for start in range(0, len(data), size))


def tar(files):
    """A tar of (name, bytes)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pdf(texts, size=(612, 792)):
    """A PDF with a text layer, one page per text."""
    sides = tuple(str(side).encode() for side in size)
    kids = b" ".join(b"%d 0 R" % (4 + 2 * i) for i in range(len(texts)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(texts), kids),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, text in enumerate(texts):
        page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 %s %s] /Contents %d 0 R " % (*sides, 5 + 2 * i)
        drawn = b"BT /F1 24 Tf 72 700 Td (%s) Tj ET" % text.encode()
        objects.append(page + b"/Resources << /Font << /F1 3 0 R >> >> >>")
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(drawn), drawn))
    body, places = b"%PDF-1.4\n", []
    for number, entry in enumerate(objects, 1):
        places.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, entry)
    xref = b"xref\n0 %d\n0000000000 65535 f \n" % (len(places) + 1) + b"".join(b"%010d 00000 n \n" % p for p in places)
    trailer = b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(places) + 1, len(body))
    return body + xref + trailer
