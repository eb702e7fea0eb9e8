"""Class folders of real artwork in colour: python -m benchmarks.sprites FOLDER [--units FOLDER]

Debian's package wesnoth-1.16-data holds the unit pictures of the game Battle for Wesnoth. Those of 72 x 72 pixels are
composed on grey and written to FOLDER/train and FOLDER/val, one class per people. Frames of one unit resemble each
other, so units are held out, not frames: every fifth of a class. Peoples of fewer than five units are left out.
"""

import argparse
import re
from pathlib import Path

from PIL import Image

from ear.errors import UserError

UNITS = Path("/usr/share/games/wesnoth/1.16/data/core/images/units")
SIDE = 72
_GREY = (128, 128, 128, 255)
_FOLD = 5


def unit(path: Path) -> str:
    """The unit in a picture; path below its people: fighter+female-die-2.png, fighter/run-1.png => fighter."""
    return re.split(r"[-+.]", path.parts[0])[0]


def peoples(units: Path) -> dict[str, dict[str, list[Path]]]:
    """People => unit => its pictures of the right size; peoples of five units or more."""
    found: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(units.glob("*/**/*.png")):
        with Image.open(path) as picture:
            if picture.size != (SIDE, SIDE):
                continue
        people, *rest = path.relative_to(units).parts
        found.setdefault(people, {}).setdefault(unit(Path(*rest)), []).append(path)
    return {people: of for people, of in found.items() if len(of) >= _FOLD}


def composed(path: Path) -> Image.Image:
    """The picture on grey, without its transparency."""
    with Image.open(path) as picture:
        rgba = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, _GREY), rgba).convert("RGB")


def write(units: Path, folder: Path) -> dict[str, int]:
    """Write FOLDER/train/PEOPLE/PICTURE.png and FOLDER/val/... => the number of pictures of each part."""
    if not units.is_dir():
        raise UserError(f"{units} is no folder; install wesnoth-1.16-data, or name the unit pictures with --units.")
    if folder.exists():
        raise UserError(f"{folder} exists already; name a new folder.")
    counts = {"train": 0, "val": 0}
    for people, of in peoples(units).items():
        for position, paths in enumerate(of.values()):
            part = "val" if position % _FOLD == _FOLD - 1 else "train"
            for path in paths:
                target = folder / part / people / "-".join(path.relative_to(units / people).parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                composed(path).save(target)
            counts[part] += len(paths)
    return counts


def main() -> None:
    """Write, and count."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sprites", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--units", type=Path, default=UNITS, help="unit pictures (default: the package's)")
    arguments = parser.parse_args()
    counts = write(arguments.units, arguments.folder)
    print(f"{counts['train']} training and {counts['val']} held-out pictures in {arguments.folder}")


if __name__ == "__main__":
    main()
