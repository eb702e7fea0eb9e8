"""Find the raw images, check them and list them.

Reads data.path where data.source is folder; never copies or changes what lies there. Writes data/raw: manifest.csv,
source.json and, where data.source is digits, the digits themselves. DVC does not watch data.path: after a change there
list it again with `dvc repro --single-item --force fetch`.
"""

from collections import Counter
from pathlib import Path

from ear import records, sources
from stages import program

RAW = Path("data/raw")


def work(parameters) -> None:
    """List, and write the embedded digits first."""
    data = parameters.data
    if data.source == "folder":
        _check_apart(Path(data.path))
    with records.whole_folder(RAW) as folder:
        root = tree = Path(data.path)
        if data.source == "digits":
            root, tree = RAW / "digits", folder / "digits"  # where they will be, and where they are now
            sources.write_digits(tree, val_fraction=data.val_fraction)
        found = sources.scan(tree, val_fraction=data.val_fraction)
        manifest = sources.write_manifest(folder, found, tree=tree, root=root)
    counts = Counter(row.split for row in manifest.rows)
    print(f"{len(manifest.classes)} classes, {counts['train']} training images, {counts['val']} held out")


def _check_apart(path: Path) -> None:
    """Stages replace whole folders of data/: a user's images must not lie there."""
    if path.resolve().is_relative_to(Path("data").resolve()):
        raise ValueError(
            f"data.path is {str(path)!r}, inside data/, where stages replace whole folders; move the images elsewhere."
        )


if __name__ == "__main__":
    program.run("fetch", work, __doc__)
