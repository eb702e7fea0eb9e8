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


if __name__ == "__main__":
    program.run("fetch", work, Parameters, __doc__, check=config.check_files)
