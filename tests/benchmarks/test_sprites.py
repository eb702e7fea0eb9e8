"""Class folders of unit pictures: right classes, units held out as a whole, no transparency."""

import numpy as np
import pytest
from PIL import Image

from benchmarks import sprites
from ear.errors import UserError


def picture(path, color, size=(72, 72)):
    """A square of this colour on a transparent ground, 8 pixels wide around the centre."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", size, (255, 0, 255, 0))
    image.paste(color, (32, 32, 40, 40))
    image.save(path)


@pytest.fixture
def units(tmp_path):
    """Two peoples of five units and one of four, with frames, folders and a picture of another size."""
    root = tmp_path / "units"
    for people, count in (("elves", 5), ("orcs", 5), ("ogres", 4)):
        for k in range(count):
            picture(root / people / f"unit{k}.png", (10 * k, 200, 0, 255))
            picture(root / people / f"unit{k}+female-die-2.png", (10 * k, 200, 0, 128))
    picture(root / "elves" / "unit4" / "run-1.png", (1, 2, 3, 255))
    picture(root / "orcs" / "large.png", (1, 2, 3, 255), size=(90, 72))
    return root


def test_units_are_held_out_with_all_their_frames(units, tmp_path):
    assert sprites.write(units, tmp_path / "out") == {"train": 16, "val": 5}
    held_out = sorted(str(path.relative_to(tmp_path / "out" / "val")) for path in (tmp_path / "out").glob("val/*/*"))
    assert held_out == [
        "elves/unit4+female-die-2.png",
        "elves/unit4-run-1.png",
        "elves/unit4.png",
        "orcs/unit4+female-die-2.png",
        "orcs/unit4.png",
    ]
    assert {path.name for path in (tmp_path / "out" / "train").iterdir()} == {"elves", "orcs"}


def test_pictures_lie_on_grey(units, tmp_path):
    sprites.write(units, tmp_path / "out")
    with Image.open(tmp_path / "out/train/elves/unit1.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (72, 72, 3)
    assert pixels[0, 0].tolist() == [128, 128, 128]
    assert pixels[36, 36].tolist() == [10, 200, 0]
    with Image.open(tmp_path / "out/train/elves/unit1+female-die-2.png") as image:
        assert np.asarray(image)[36, 36].tolist() == pytest.approx([69, 164, 64], abs=1)


def test_a_missing_package_and_an_existing_folder_are_errors(units, tmp_path):
    with pytest.raises(UserError, match=r"nowhere is no folder; install wesnoth-1\.16-data"):
        sprites.write(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match=r"exists already; name a new folder"):
        sprites.write(units, tmp_path)
