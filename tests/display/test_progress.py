"""Progress in a log: plain lines with rates, the note last."""

import pytest

from ear.display.progress import Progress, track


def test_the_last_line_counts_everything(capsys):
    with Progress("work", 10, unit="img", start=4) as progress:
        progress.advance(6, note="loss 0.5")
    line = capsys.readouterr().out
    assert line.startswith("work: 10/10 img  ")
    assert line.endswith("0 s left  loss 0.5\n")


def test_a_failure_prints_no_final_line(capsys):
    with pytest.raises(ZeroDivisionError), Progress("work", 10) as progress:
        progress.advance(3 // len(""))
    assert capsys.readouterr().out == ""


def test_track_yields_every_item(capsys):
    assert list(track("abc", "letters", 3, unit="letter")) == ["a", "b", "c"]
    assert capsys.readouterr().out.startswith("letters: 3/3 letter")
