"""Find the raw images, check them and list them.

Reads data.path, unless data.source is digits: a tree of class folders, or ImageNet (unpacked, in Kaggle's layout, or in
its official archives, which are read in place). Nothing there is copied or changed. Writes data/raw: manifest.csv,
source.json and, if data.source is digits, the digits. Files needed by later stages are checked first; a missing one is
reported immediately. DVC does not watch data.path: after changing images, list them again with `dvc repro --single-item
--force fetch`.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ear import config
from ear.data import manifest, sources
from ear.errors import MissingFileError, UserError
from ear.lineage.run import Run
from stages import program

RAW = Path("data/raw")


@dataclass(frozen=True)
class Parameters:
    """What the stage depends on."""

    source: Annotated[str, "data.source"]
    path: Annotated[str, "data.path"]
    val_fraction: Annotated[float, "data.val_fraction"]


def work(data: Parameters, run: Run) -> None:
    """List the images, and write the digits first if they are the source."""
    if data.source != "digits":
        _check_apart(Path(data.path))
    folder = run.output(RAW)
    path = folder / "digits" if data.source == "digits" else Path(data.path)
    if data.source == "digits":
        sources.write_digits(path, val_fraction=data.val_fraction)
    source = sources.find(path, val_fraction=data.val_fraction)
    if data.source == "imagenet":
        sources.check_imagenet(source)
    listed = manifest.write_manifest(
        folder,
        source.images,
        tree=source.root,
        root=RAW / "digits" if data.source == "digits" else source.root,
        names=source.names,
        upright=data.source != "imagenet",  # the pipelines behind published figures ignore the EXIF rotation
    )
    counts = Counter(row.split for row in listed.rows)
    print(
        f"{source.layout}: {len(listed.classes)} classes, {counts['train']} training images, {counts['val']} held out"
    )


def check_files(parameters: config.Parameters) -> None:
    """Raise MissingFileError for the first absent file that a later stage needs (`work` checks data.path)."""
    missing = config.missing_files(parameters)
    missing.pop("data.path", None)
    for sentence in missing.values():
        raise MissingFileError(sentence)


def _check_apart(path: Path) -> None:
    """Refuse a data.path inside data/, where stages replace folders."""
    if path.resolve().is_relative_to(Path("data").resolve()):
        raise UserError(
            f"data.path is {str(path)!r}, inside data/, where stages replace whole folders; move the images elsewhere."
        )


if __name__ == "__main__":
    program.run("fetch", work, Parameters, __doc__, check=check_files)
