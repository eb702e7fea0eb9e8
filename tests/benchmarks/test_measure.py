"""The room that benchmarks share."""

import json
import time

from benchmarks import measure


def test_the_median_ignores_the_first_call_and_an_outlier():
    pauses = iter([0.2, 0.01, 0.2, 0.01])
    assert 0.01 <= measure.median_seconds(lambda: time.sleep(next(pauses)), repeats=3) < 0.1


def test_a_report_is_json_and_is_kept_where_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    measure.report("rate", {"images_per_second": 1234.5678})
    assert not list(tmp_path.iterdir())
    printed = json.loads(capsys.readouterr().out)
    assert printed["figures"] == {"images_per_second": 1234.57}
    assert printed["machine"]["cores"] >= 1
    measure.report("rate", {"images_per_second": 1234.5678}, save=measure.arguments("").parse_args(["--save"]).save)
    kept = json.loads((tmp_path / "rate.json").read_text())
    assert kept["figures"] == printed["figures"]
    assert kept["benchmark"] == "rate"
