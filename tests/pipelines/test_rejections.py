"""Rows that are rejected, and images that are dropped from documents which go on: told apart wherever they are counted."""

import pytest

from pipelines.rejections import check_rejected
from pipelines.reporting.sections import section
from pipelines.runner.outcome import Attempt
from pipelines.runner.record import Record


def test_dropped_images_are_no_rejected_rows() -> None:
    check_rejected("corpus", 100, {"dropped_image_missing": 400}, 0.2)
    with pytest.raises(ValueError, match=r"30 of 130 rows rejected \(malformed_row 30\), more than"):
        check_rejected("corpus", 100, {"dropped_image_missing": 400, "malformed_row": 30}, 0.2)
    with pytest.raises(ValueError, match=r"nothing usable in 2 rows \(empty 2\)"):
        check_rejected("corpus", 0, {"dropped_image_missing": 5, "empty": 2}, 0.2)


def test_the_report_says_which_are_documents_and_which_are_images(tmp_path) -> None:
    result = {"documents": 90, "sources": ["web"], "rejected": {"dropped_image_missing": 1400, "empty": 3}}
    record = Record("corpus", "f" * 16, {}, result, "2026-11-23T08:00:10+00:00", 1.5)
    made = section(Attempt("corpus", "corpus", "", "done"), str(tmp_path), record)
    assert [warning.split(" could")[0] for warning in made.warnings] == ["3 documents", "1,400 images"]
    assert [(table.columns, table.rows) for table in made.tables] == [
        (["why", "documents"], [["empty", "3"]]),
        (["why", "images"], [["image missing", "1,400"]]),
    ]
