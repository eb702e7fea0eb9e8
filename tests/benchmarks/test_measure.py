"""What all benchmarks share: timings, baselines in another process, reports."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from benchmarks import measure


def test_the_median_ignores_the_first_call_and_an_outlier():
    pauses = iter([0.2, 0.01, 0.2, 0.01])
    assert 0.01 <= measure.median_seconds(lambda: time.sleep(next(pauses)), repeats=3) < 0.1


def counter(folder: str):
    """A function that leaves a file per call, with its process."""
    return lambda: Path(folder, f"{len(list(Path(folder).iterdir()))}-{os.getpid()}").touch()


def broken():
    raise ValueError("no such preset")


def killed():
    return lambda: os.kill(os.getpid(), signal.SIGKILL)


def test_a_baseline_runs_in_one_process_of_its_own(tmp_path):
    with measure.elsewhere(counter, str(tmp_path)) as call:
        call()
        call()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.split("-")[0] for name in names] == ["0", "1"]
    assert len({name.split("-")[1] for name in names} | {str(os.getpid())}) == 2
    with measure.elsewhere(broken) as call, pytest.raises(RuntimeError, match="ValueError: no such preset"):
        call()
    with measure.elsewhere(killed) as call, pytest.raises(RuntimeError, match="in its process: it ended with code -9"):
        call()


def test_a_report_is_json_and_is_kept_where_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    parser = measure.arguments("")
    measure.report("rate", {"images_per_second": 1234.5678}, parser.parse_args([]))
    assert not list(tmp_path.iterdir())
    printed = json.loads(capsys.readouterr().out)
    assert printed["figures"] == {"images_per_second": 1234.57}
    assert printed["machine"]["cores"] >= 1
    measure.report("rate", {"images_per_second": 1234.5678}, parser.parse_args(["--save"]))
    measure.report(
        "rate", {"images_per_second": 1.0}, parser.parse_args(["--save", "--results", str(tmp_path / "new")])
    )
    assert json.loads((tmp_path / "new/rate.json").read_text())["figures"] == {"images_per_second": 1.0}
    kept = json.loads((tmp_path / "rate.json").read_text())
    assert kept["figures"] == printed["figures"]
    assert kept["benchmark"] == "rate"
