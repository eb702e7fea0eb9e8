"""The notebook of examples/: its cells run in order and show what its text says."""

import json
from pathlib import Path

import matplotlib as mpl
import numpy as np

ROOT = Path(__file__).parents[1]


def test_the_tour_runs_and_shows_what_it_says(monkeypatch):
    mpl.use("Agg")
    monkeypatch.chdir(ROOT / "examples")
    cells = json.loads(Path("tour.ipynb").read_text())["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), names)
    assert names["images"].shape == (30, 8, 8, 3)
    variety = [part.std(axis=0).mean() for part in names["by_scale"]]
    assert variety[0] > variety[2]
    assert np.array_equal(names["states"][-1], names["pipeline"].generate([3], seed=2))
    mask = names["mask"]
    assert np.array_equal(names["edited"][~mask], names["known"][~mask])
    assert not np.array_equal(names["edited"][mask], names["known"][mask])
