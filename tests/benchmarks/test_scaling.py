"""docs/scaling.md: its tables are those of the saved measurements."""

from pathlib import Path

import pytest

from benchmarks import measure, scaling_page
from ear.files.json_files import read_json

ROOT = Path(__file__).parents[2]


def test_the_document_shows_the_saved_figures():
    saved = {name: read_json(measure.RESULTS / f"{name}.json") for name in scaling_page.NEEDED}
    document = (ROOT / "docs/scaling.md").read_text()
    tables = scaling_page.tables(saved)
    assert document == scaling_page.fill(document, tables)
    assert all(table in document and table.count("\n") > 3 for table in tables.values())


def test_times_are_units_times_cost():
    precise = scaling_page.Work("cache", "an image", 2.0, 1e12, (3600, 7200))
    fast = scaling_page.Work("train", "an image", 2.0, 1e12, (3600, 7200), "bfloat16")
    table = scaling_page._time_table([precise, fast], gpus=2, teraflops={"float32": 25, "bfloat16": 50})
    assert table.splitlines()[-2].split(" | ")[4] == "1.2 minutes"
    assert table.splitlines()[-1] == (
        "| train | bfloat16 | 3,600 | 2.0 hours | 36.0 seconds | 7,200 | 4.0 hours | 1.2 minutes |"
    )


def test_tables_replace_what_stood_between_their_marks():
    document = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n"
    filled = scaling_page.fill(document, {"one": "| 1 |", "two": "| 2 |"})
    assert filled == "a\n<!-- one -->\n| 1 |\n<!-- end -->\nb\n<!-- two -->\n| 2 |\n<!-- end -->\n"
    assert scaling_page.fill(filled, {"one": "| 1 |", "two": "| 2 |"}) == filled
    with pytest.raises(ValueError, match="no lines <!-- three -->"):
        scaling_page.fill(document, {"three": ""})
