"""2,000 broken files, and rows built to cost: whatever is in a file, every row of it is a document, a pair or a rejection.

The files are read in a child process, so that a reader that crashes, hangs or eats the machine fails a test and not the tests.
"""

import datetime
import decimal
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from document_files import lines, packed, pdf, put, tar
from PIL import Image

MUTANTS = 2000
SECONDS = 60
SECONDS_PER_FILE = 5.0
GROWTH_MIB = 1000  # the largest line of JSON, what Python makes of it, and its document

# Reads the files of a list in order. A line per file: its name before it is read, and what became of its rows.
READER = """
import json, sys, time
from collections import Counter
import pyarrow.fs as pafs
from moca_core import sources
from moca_core.data.image_files import ImageBounds
from moca_core.data.schema import documents_to_table, pairs_to_table, rejected_to_table
from moca_core.data.validate import valid_documents, valid_pairs
from moca_core.types import Document, Pair, Rejected

FS, bounds = pafs.LocalFileSystem(), ImageBounds(2**20, 8_000_000)
before = None

def peak():  # not getrusage, whose peak includes the process that started this one
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

def outcomes(kind, layout, path):
    pairs = kind == "pairs"
    adapter = sources.adapter(sources.PAIRS if pairs else sources.DOCUMENTS, layout)
    location = sources.Location(FS, path)
    for unit in adapter.list_units(location):
        items = adapter.read_pairs(location, unit) if pairs else adapter.read_unit(location, unit)
        for item in (valid_pairs if pairs else valid_documents)(items, bounds):
            yield item
            to_table = {Document: documents_to_table, Pair: pairs_to_table, Rejected: rejected_to_table}[type(item)]
            assert to_table([item]).num_rows == 1 and item.where.startswith(path), item

for line in sys.stdin:
    kind, layout, path = json.loads(line)
    print(json.dumps(path), flush=True)
    before = before or peak()
    start, counts = time.process_time(), Counter()
    try:
        for item in outcomes(kind, layout, path):
            counts[item.reason if isinstance(item, Rejected) else "good"] += 1
    except ValueError as error:  # a broken footer: its columns have other names
        if "no column" not in str(error):
            raise
        counts["no_column"] += 1
    print(json.dumps([counts, time.process_time() - start, (peak() - before) / 1024]), flush=True)
"""


def png(seed):
    out = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((60, 40)).save(out, "PNG")
    return out.getvalue()


A, B = png(1), png(2)
STRUCT = {"bytes": A, "path": "a.png"}
# layout: (a row as it should be, the columns that are mutated)
TABLES = {
    "obelics": {"texts": ["one", None], "images": [None, A]},
    "moca": {"text": "one<|vision_start|><|image_pad|><|vision_end|>", "images": [A]},
    "text": {"text": "one"},
    "captions": {"image": STRUCT, "caption": "one"},
    "pages": {"image": STRUCT, "query": "one", "answer": "two", "texts": None, "negatives": [STRUCT]},
}
LINES = {
    "text": {"text": "one"},
    "mmc4": {"text_list": ["one", "two"], "image_info": [{"image_name": "a.png", "matched_text_index": 1}]},
}
PAIR_TABLES = {
    "pages": TABLES["pages"],
    "triplets": {"query": "one", "positive": "two", "negative": ["three"]},
    "mmeb": {
        **{"qry": "one", "qry_image_path": "", "pos_text": "<|image_1|>", "pos_image_path": "a.png"},
        **{"neg_text": "['x']", "neg_image_path": "['']"},
    },
}
PAIR_LINES = {
    "jsonl": {"query": "one", "positive": {"image": "a.png"}, "negatives": [[{"text": "x"}]]},
    "triplets": PAIR_TABLES["triplets"],
}
HTML = """<!DOCTYPE html><html><body><h1>a</h1><p class='x'>b <img src='a.png' alt=c></p><!-- d -->
<pre>e</pre><script>f</script></body></html>"""
MARKDOWN = """---
t: x
---
# a
![b](a.png "c") `d` ``e``
```py
![f](a.png)
```
<img src='a.png'> ![g](data:image/png;base64,AAAA)
"""
FILES = {
    "text.txt": b"one\ntwo",
    "markup.md": MARKDOWN.encode(),
    "markup.html": HTML.encode(),
    "pdf.pdf": pdf(["one", "two", "three"], (200, 150)),
    "webdataset.tar": tar(
        [("1.png", A), ("1.txt", b"one"), ("2.png", B), ("2.json", b'{"caption": "two"}'), ("3.txt", b"x")]
    ),
}
WRONG = [
    *[
        None,
        True,
        -1,
        2**62,
        1.5,
        float("nan"),
        "",
        "x" * 100_000,
        "\0",
        "../../../etc/passwd",
        "/",
        ".",
        "a.png\0",
        "x" * 5000 + ".png",
    ],
    *[
        "[" * 3000,
        "<|vision_start|><|image_pad|><|vision_end|>" * 3,
        "data:image/png;base64,!",
        "\udcff",
        "http://x/y.png",
        "'" * 999,
    ],
    *[
        [],
        [None],
        [[]],
        [1, 2],
        ["a", None, "b"],
        [[["x"]]],
        {"bytes": None, "path": None},
        {"bytes": "a.png"},
        {"text": 3},
        {"x": 1},
    ],
]
NO_ROWS = [
    *[b"\xff\xfe{}\n", b"\0\n", b"[]\n", b"{\n", b"null\n", b'"x"\n'],
    *[b"[" * 100_000 + b"\n", b'{"text": ' + b"9" * 5000 + b"}\n"],
]
WRONG_TYPES = [
    *[
        pa.nulls(4),
        pa.array([1, None, 3, 4]),
        pa.array([True] * 4),
        pa.array([1.5] * 4),
        pa.array([[1], None, [2], []]),
    ],
    *[pa.array([{"bytes": "x", "path": b"y"}] * 4), pa.array([{"text": 1}] * 4), pa.array([[{"a": [{"b": 1}]}]] * 4)],
    *[pa.array([[("k", "v")]] * 4, pa.map_(pa.string(), pa.string())), pa.array([decimal.Decimal("1.5")] * 4)],
    *[
        pa.array([datetime.date(1, 1, 1)] * 4),
        pa.array([2**62] * 4, pa.timestamp("us")),
        pa.array([2**62] * 4, pa.duration("us")),
    ],
    *[pa.array([b"\xff\xfe", b"ok", None, b"\xed\xa0\x80"], pa.binary()), pa.array(["x"] * 4, pa.large_string())],
    *[
        pa.array(["a", "b", "a", None]).dictionary_encode(),
        pa.array(["x"] * 4, pa.string_view()),
        pa.array([[b"x"]] * 4),
    ],
    *[pa.array([["x" * 500_000], [None], [""], ["a"] * 1000]), pa.array([[1, 2]] * 4, pa.list_(pa.int8(), 2))],
    pa.StringArray.from_buffers(4, pa.array([0, 1, 2, 3, 4], pa.int32()).buffers()[1], pa.py_buffer(b"\xffa\xc3b")),
]


def mutated_table(row, rng):
    """Four rows of Parquet of which one or all columns are of another type, and how many rows that are."""
    columns = {name: pa.array([value] * 4) for name, value in row.items()}
    for name in rng.choice(list(row), rng.integers(1, len(row) + 1), replace=False):
        columns[name] = WRONG_TYPES[rng.integers(len(WRONG_TYPES))]
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, row_group_size=int(rng.integers(1, 5)))
    return out.getvalue(), 4


def mutated_lines(row, rng):
    """Four rows of JSON lines with wrong values or broken bytes, and how many rows that are."""
    rows = []
    for _ in range(4):
        wrong = json.loads(json.dumps(row))
        for name in rng.choice(list(row), rng.integers(1, len(row) + 1), replace=False):
            value = WRONG[rng.integers(len(WRONG))]
            inner = wrong[name][-1] if isinstance(wrong[name], list) else wrong[name]
            if isinstance(inner, dict) and rng.random() < 0.7:
                inner[rng.choice(list(inner))] = value
            else:
                wrong[name] = [value, [value]][rng.integers(2)]
        rows.append(lines([wrong]))
    if rng.random() < 0.3:
        rows[rng.integers(4)] = NO_ROWS[rng.integers(len(NO_ROWS))]
    return b"".join(rows), 4


def damaged(data, rng):
    """The same file cut, with bits flipped, or with a piece of it missing, doubled or blank."""
    data = bytearray(data)
    kind = rng.integers(5)
    if kind == 0:
        return bytes(data[: rng.integers(len(data))])
    if kind == 1:
        for place in rng.integers(len(data), size=rng.integers(1, 9)):
            data[place] ^= 1 << rng.integers(8)
        return bytes(data)
    start, end = sorted(rng.integers(len(data) + 1, size=2))
    middle = {2: b"", 3: data[start:end] * 2, 4: bytes(end - start)}[int(kind)]
    return bytes(data[:start] + middle + data[end:])


def table_of(row):
    out = io.BytesIO()
    pq.write_table(pa.table({name: pa.array([value] * 4) for name, value in row.items()}), out, row_group_size=2)
    return out.getvalue()


def mutants(rng):
    """(kind, layout, end of the name, bytes, rows or None) without end, every layout in turn."""
    for _ in range(MUTANTS):
        for kind, tables, line_rows in (("documents", TABLES, LINES), ("pairs", PAIR_TABLES, PAIR_LINES)):
            for layout, row in tables.items():
                yield kind, layout, ".parquet", *mutated_table(row, rng)
                yield kind, layout, ".parquet", damaged(table_of(row), rng), None
            for layout, row in line_rows.items():
                data, count = mutated_lines(row, rng)
                yield kind, layout, ".jsonl", data, count
                extension = (".gz", ".zst")[rng.integers(2)] if layout != "jsonl" else ""
                whole = lines([row] * 20)
                yield (
                    kind,
                    layout,
                    f".jsonl{extension}",
                    damaged(packed(whole, extension, 3) if extension else whole, rng),
                    None,
                )
        for name, data in FILES.items():
            layout, _, extension = name.partition(".")
            yield "documents", layout, f".{extension}", damaged(data, rng), None
        yield "documents", "webdataset", ".tar.gz", damaged(packed(FILES["webdataset.tar"], ".gz"), rng), None


def read_in_child(files):
    """(counts, seconds, MiB of growth so far) of every file. Fails naming the file at which the child ended."""
    asked = "".join(json.dumps(file) + "\n" for file in files)
    try:
        done = subprocess.run(
            [sys.executable, "-c", READER], input=asked, capture_output=True, text=True, timeout=3 * SECONDS
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"hangs: {(error.stdout or b'')[-300:]}")
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"exit {done.returncode} at {said[-1]}: {done.stderr[-3000:]}"
    return said[1::2]


def test_mutants_are_accounted_for_to_the_row(tmp_path):
    files, rows = [], []
    put(tmp_path / "a.png", A)
    for number, (kind, layout, extension, data, count) in zip(
        range(MUTANTS), mutants(np.random.default_rng(1)), strict=False
    ):
        path = put(tmp_path / f"{number:04d}_{kind}_{layout}{extension}", data)
        files.append([kind, layout, str(path)])
        rows.append(count)
    outcomes = read_in_child(files)
    assert len(outcomes) == MUTANTS
    for (_, layout, path), count, (counts, seconds, _) in zip(files, rows, outcomes, strict=True):
        assert seconds < SECONDS_PER_FILE, (path, seconds)
        if count is not None and layout != "pages":  # a page may have no question or several
            assert sum(counts.values()) == count, (path, counts)
        assert counts or not Path(path).read_bytes().strip() or layout == "pages", path
    total = {}
    for counts, _, _ in outcomes:
        for reason, number in counts.items():
            total[reason] = total.get(reason, 0) + number
    assert total["good"] > 1000 and total["unreadable_file"] > 100 and len(total) > 12, total
    assert sum(seconds for _, seconds, _ in outcomes) < SECONDS
    assert outcomes[-1][2] < GROWTH_MIB
    print(total, sum(s for _, s, _ in outcomes), max(s for _, s, _ in outcomes), outcomes[-1][2])


def test_no_byte_of_a_footer_ends_the_process(tmp_path):
    """Arrow ends the process, past all handlers, where it is asked for a broken entry of a column."""
    whole = table_of(TABLES["text"])
    start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    broken = (
        whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :] for at in range(start, len(whole)) for bit in (1, 2)
    )
    paths = [put(tmp_path / f"{number:04d}.parquet", data) for number, data in enumerate(broken)]
    outcomes = read_in_child([["documents", "text", str(path)] for path in paths])
    assert len(outcomes) == len(paths) > 500 and all(counts for counts, _, _ in outcomes)


def header(name, size, kind=b"0"):
    """A tar header that claims this size."""
    number = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    data = name.ljust(100, b"\0") + b"0000644\0" * 3 + number + b"0" * 11 + b"\0" + b" " * 8 + kind + bytes(355)
    return data[:148] + b"%06o\0 " % sum(data) + data[156:]


def parquet_claiming_rows():
    """A file whose footer claims 2**31 rows in place of its four: numbers are zigzag varints there."""
    return table_of(TABLES["text"]).replace(b"\x16\x08", b"\x16\x80\x80\x80\x80\x10")


HOSTILE = {
    "text_long_line.jsonl.gz": packed(b'{"text": "' + b"x" * 150_000_000 + b'"}\n{"text": "a"}\n', ".gz"),
    "text_long_line.jsonl.zst": packed(b"x" * 300_000_000, ".zst"),
    "text_many_objects.jsonl": b'{"text": [' + b"[]," * 2_000_000 + b"[]]}\n",
    "text_deep.jsonl": b'{"text":' * 200_000,
    "mmc4_same_place.jsonl": lines(
        [{"text_list": ["a"], "image_info": [{"image_name": "a.png", "matched_text_index": 0}] * 5_000}]
    ),
    "webdataset_claim.tar": header(b"1.png", 2**60) + bytes(10_000),
    "webdataset_claim2.tar": header(b"1.png", 200 * 2**20) + bytes(10_000),
    "webdataset_long_name.tar": header(b"x", 2**40, b"L") + bytes(10_000),
    "webdataset_pax.tar": header(b"x", 512, b"x") + b"0 a=b\n".ljust(512, b"\0") + bytes(1024),
    "webdataset_pax2.tar": header(b"x", 512, b"x") + b"9" * 512 + bytes(1024),
    "webdataset_sparse.tar": header(b"1.png", 0, b"S")[:482] + b"\1" * 30 + b"\1" * 100_000,
    "webdataset_one_key.tar": b"".join(header(b"k.%d" % i, 0) for i in range(30_000)) + bytes(1024),
    "webdataset_bomb.tar.gz": packed(header(b"1.png", 400_000_000) + bytes(400_000_000 // 512 * 512 + 1024), ".gz"),
    "webdataset_deep.tar": tar([("1.json", b"[" * 500_000), ("2.json", b'{"texts":' * 100_000)]),
    "markup_tags.html": b"<a " * 1_000_000,
    "markup_marked.html": b"<![<!--<!" * 300_000,
    "markup_quotes.html": b"<a b='<a b=\"" * 300_000,
    "markup_values.html": b"<a b" + b" " * 1_000_000 + b"= " * 500_000 + b"<a b=\"'>" * 300_000 + b"='>" * 300_000,
    "markup_open.md": b"![" * 1_000_000 + b"`a``b" * 500_000,
    "markup_images.md": b"![](a.png)" * 5_000,
    "markup_front.md": b"---\n" + b"--- x\n" * 300_000,
    "markup_keys.md": b"---\n" + b"# x\n" * 300_000 + b" " * 300_000 + b"x" * 300_000 + b"\n",
    "pdf_giant.pdf": pdf(["x"], (10**9, 10**9)),
    "pdf_loop.pdf": pdf(["x"]).replace(b"/Kids [4 0 R]", b"/Kids [2 0 R]"),
    "pdf_count.pdf": pdf(["x"]).replace(b"/Count 1 ", b"/Count 2147483647 "),
    "text_rows.parquet": parquet_claiming_rows(),
}


def test_what_files_claim_costs_nothing(tmp_path):
    put(tmp_path / "a.png", A)
    files = [["documents", name.partition("_")[0], str(put(tmp_path / name, data))] for name, data in HOSTILE.items()]
    outcomes = read_in_child(files)
    for (_, _, path), (counts, seconds, growth) in zip(files, outcomes, strict=True):
        print(Path(path).name, counts, round(seconds, 2), round(growth))
    for (_, _, path), (_, seconds, growth) in zip(files, outcomes, strict=True):
        assert seconds < SECONDS_PER_FILE and growth < GROWTH_MIB, (path, seconds, growth)
    assert all(counts for counts, _, _ in outcomes)
