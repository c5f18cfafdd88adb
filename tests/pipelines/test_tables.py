"""Tables on a local folder and on S3: rows by their address, a file whole or not at all."""

import pyarrow as pa
import pytest

from cluster import storage
from pipelines.tables import open_table, read_rows, read_table, table_writer

SCHEMA = pa.schema([("n", pa.int64())])


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


def test_rows_are_fetched_by_their_place(root):
    uri = storage.join(root, "folder", "table.parquet")
    with table_writer(uri, SCHEMA, rows_per_group=3) as writer:
        writer.write(pa.table({"n": range(6)}))
        writer.write(pa.table({"n": range(6, 10)}))
    assert writer.rows == 10 and open_table(uri).num_row_groups == 4
    assert [row["n"] for row in read_rows(uri, [9, 0, 4], 3)] == [9, 0, 4]
    assert read_table(uri)["n"].to_pylist() == list(range(10))


@pytest.mark.parametrize("sizes", [[1] * 10, [10], [2, 0, 7, 1], [3, 3, 4], [4, 4, 2], [0], []])
def test_groups_are_full_whatever_the_tables(sizes, tmp_path):
    uri = str(tmp_path / "table.parquet")
    with table_writer(uri, SCHEMA, rows_per_group=3) as writer:
        for size in sizes:
            writer.write(pa.table({"n": range(writer.rows, writer.rows + size)}, schema=SCHEMA))
    rows = sum(sizes)
    assert writer.rows == rows and read_table(uri)["n"].to_pylist() == list(range(rows))
    metadata = open_table(uri).metadata
    groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    assert groups == [3] * (rows // 3) + [rows % 3] * (rows % 3 > 0)


def test_groups_are_written_as_they_fill(tmp_path):
    with table_writer(str(tmp_path / "table.parquet"), SCHEMA, rows_per_group=1000) as writer:
        (unfinished,) = tmp_path.iterdir()
        sizes = []
        for start in range(0, 4000, 500):
            writer.write(pa.table({"n": range(start, start + 500)}))
            sizes.append(unfinished.stat().st_size)
    assert sizes[-1] > sizes[0] and [path.name for path in tmp_path.iterdir()] == ["table.parquet"]


def test_an_interrupted_writer_leaves_no_file(root):
    uri = storage.join(root, "table.parquet")
    with pytest.raises(RuntimeError, match="interrupted"), table_writer(uri, SCHEMA, rows_per_group=3) as writer:
        writer.write(pa.table({"n": range(3)}))
        raise RuntimeError("interrupted")
    assert not storage.exists(uri)
    assert storage.list_files(root + "/table.parquet") == []
