"""Find the raw images, check them and list them.

Reads data.path, unless data.source is digits: a tree of class folders, ImageNet (unpacked, in Kaggle's layout, or in
its official archives, which are read in place), or arrays (idx files or npz). Nothing there is changed, and only the
pixels of arrays are copied. Writes data/raw: manifest.csv, source.json, and the digits or the pixels of the arrays, if
they are the source. Files needed by later stages are checked first; a missing one is
reported immediately. DVC does not watch data.path: after changing images, list them again with `dvc repro --single-item
--force fetch`.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ear import config
from ear.data import manifest, sources
from ear.data.images import Encoding
from ear.errors import UserError
from ear.lineage.run import Run
from stages import program

RAW = Path("data/raw")


@dataclass(frozen=True)
class Parameters:
    """What the stage depends on."""

    source: Annotated[str, "data.source"]
    path: Annotated[str, "data.path"]
    val_fraction: Annotated[float, "data.val_fraction"]
    class_names: Annotated[tuple[str, ...], "data.class_names"]


def work(data: Parameters, run: Run) -> None:
    """List the images, and write the digits first if they are the source."""
    folder = run.output(RAW)
    path = folder / "digits" if data.source == "digits" else Path(data.path)
    if data.source == "digits":
        sources.write_digits(path, val_fraction=data.val_fraction)
    source = sources.find(path, val_fraction=data.val_fraction)
    sources.check_kind(source, "folder" if data.source == "digits" else data.source)
    _check_names(data.class_names, source)
    tree, root = source.root, RAW / "digits" if data.source == "digits" else source.root
    # The pipelines behind published figures of ImageNet ignore the EXIF rotation.
    encoding = Encoding(upright=data.source != "imagenet")
    if source.arrays:
        encoding = Encoding(pixels=source.arrays[0].shape[1:], sha256=sources.unpack(source.arrays, folder))
        tree, root = folder, RAW
    listed = manifest.write_manifest(
        folder,
        source.images,
        tree=tree,
        root=root,
        names={} if data.class_names else source.names,
        encoding=encoding,
        classes=data.class_names,
    )
    counts = Counter(row.split for row in listed.rows)
    print(
        f"{source.layout}: {len(listed.classes)} classes, {counts['train']} training images, {counts['val']} held out"
    )


def _check_names(names: tuple[str, ...], source: sources.Source) -> None:
    """Raise UserError if names are given, but not a different one for every class."""
    if names and len(names) != len(source.classes):
        raise UserError(
            f"data.class_names has {len(names)} names, but {source.root} has {len(source.classes)} classes; name each "
            "of them, or none."
        )
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"data.class_names has {repeated[0]!r} twice; give every class a name of its own.")


if __name__ == "__main__":
    program.run("fetch", work, Parameters, __doc__, check=config.check_files)
