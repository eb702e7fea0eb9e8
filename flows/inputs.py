"""Images that were added, removed or changed since the fetch stage listed them; DVC does not watch data.path."""

from pathlib import Path

from ear import config
from ear.data import manifest, sources
from ear.errors import UserError

_LISTED = Path("data/raw")


def changed_images(parameters: config.Parameters) -> str:
    """How the images of data.path differ from the manifest, such as `images of data.path: 2 new`; empty if they do not.

    Empty too if nothing is listed yet, the images are the built-in digits, or the folder is on another machine: later
    stages do without it. Raises UserError as the fetch stage does.
    """
    data = parameters.data
    if data.source == "digits" or not Path(data.path).exists():
        return ""
    try:
        listed = manifest.read_manifest(_LISTED)
    except UserError:  # absent, or of an earlier version: DVC runs the stage again
        return ""
    found = sources.find(data.path, val_fraction=data.val_fraction)
    differing = manifest.changes(listed, found.images, found.root)
    return f"images of data.path: {differing}" if differing else ""
