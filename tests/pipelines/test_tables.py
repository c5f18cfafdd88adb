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


def test_an_interrupted_writer_leaves_no_file(root):
    uri = storage.join(root, "table.parquet")
    with pytest.raises(RuntimeError, match="interrupted"), table_writer(uri, SCHEMA, rows_per_group=3) as writer:
        writer.write(pa.table({"n": range(3)}))
        raise RuntimeError("interrupted")
    assert not storage.exists(uri)
