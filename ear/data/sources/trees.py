"""Images in class folders: a user's own tree, or ImageNet unpacked, whose validation images may lie side by side.

No image is opened or stat'ed.
"""

import os
from pathlib import Path

from ear.data.manifest import ListedImage
from ear.data.sources import imagenet
from ear.data.sources.listing import EXTENSIONS, Source, hold_out, in_order, is_image
from ear.errors import UserError


def find(root: Path, *, val_fraction: float) -> Source:
    """List the images of a tree.

    The tree is root/train/CLASS/**, with or without root/val/CLASS/**, or root/CLASS/**; a folder named train always
    means the first form. If the classes of train are ImageNet's, the images of root/val may lie side by side. Images
    are files with a suffix of `EXTENSIONS` in any case; other files and names that start with a dot are ignored; links
    to folders are followed. Without val, `val_fraction` of each class is held out.

    Raises UserError naming the folder if it has no class folders, images outside of them, or a class folder without
    images; if val has a class that train lacks or images of unknown class; or if nothing can be held out.
    """
    _check_names(root)
    train, val = root / "train", root / "val"
    if not train.is_dir():
        return Source(
            "class folders", "folder", root, hold_out(_classes(root, "", "train"), val_fraction), has_val=False
        )
    images = _classes(root, "train/", "train")
    known = {image.class_name for image in images}
    layout, truth = "class folders", None
    if imagenet.are_wnids(known):
        layout, truth = "ImageNet, unpacked", imagenet.find_truth(root)
    names = truth.names if truth else {}
    if not val.is_dir():
        return Source(layout, "folder", root, hold_out(images, val_fraction), names, has_val=False)
    held_out = (imagenet.are_wnids(known) and _side_by_side(root, truth)) or _classes(root, "val/", "val")
    if unknown := sorted({image.class_name for image in held_out} - known):
        raise UserError(f"{val} has class {unknown[0]!r}, which {train} lacks; the two must have the same classes.")
    return Source(layout, "folder", root, in_order(images + held_out), names)


def _check_names(root: Path) -> None:
    """Refuse folders such as `valid` or `Test`, which would be taken for a class or ignored."""
    names, _ = _entries(root)
    training = [name for name in names if name.lower() in ("train", "training")]
    held_out = [name for name in names if name.lower() in ("val", "valid", "validation", "test", "testing")]
    surely = training or [name for name in held_out if name.lower().startswith("val")]  # test alone may be a class
    if "train" in names:
        if held_out and "val" not in held_out:
            raise UserError(f"{root} has {held_out[0]} but no val; rename it to val.")
    elif (held_out and surely) or (len(names) == 1 and training):
        raise UserError(f"{root} has {surely[0]} but no train; name the folder of training images train.")


def _side_by_side(root: Path, truth: imagenet.Truth | None) -> list[ListedImage]:
    """ImageNet's validation images without class folders; empty if there are class folders."""
    folders, images = _entries(root / "val")
    if folders or not images:
        return []
    truth = imagenet.require_truth(truth, root, root / "val")
    wnids = {image: imagenet.class_of(image, truth) for image in images}
    return [ListedImage("val", wnid, f"val/{wnid}/{image}", f"val/{image}") for image, wnid in wnids.items()]


def _classes(root: Path, prefix: str, split: str) -> list[ListedImage]:
    """The images of all class folders, in order; `prefix` is the split's folder, such as `train/`, or ''."""
    folder = root / prefix
    names, loose = _entries(folder)
    if loose:
        raise UserError(
            f"{folder} holds {len(loose)} images outside of class folders, such as {loose[0]}; move each into the "
            "folder of its class."
        )
    if not names:
        raise UserError(f"{folder} has no class folders; put the images of each class into a folder of its name.")
    classes = {name: sorted(_walk(root, prefix + name)) for name in names}
    empty = [name for name, paths in classes.items() if not paths]
    if len(empty) == len(classes):
        raise UserError(f"there are no images ({', '.join(EXTENSIONS)}) in the class folders of {folder}.")
    if empty:
        raise UserError(
            f"class folder {folder / empty[0]} has no images ({', '.join(EXTENSIONS)}); fill it or remove it."
        )
    return [ListedImage(split, name, path, path) for name, paths in classes.items() for path in paths]


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the subfolders and of the images in one folder."""
    folders, images = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif is_image(entry.name):
                images.append(entry.name)
    return sorted(folders), sorted(images)


def _walk(root: Path, relative: str, above: frozenset = frozenset()) -> list[str]:
    """Paths, relative to `root`, of all images below one folder; `above` identifies the folders that contain it."""
    folder = root / relative
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise UserError(f"{folder} is a link to a folder that it lies in; remove the link.")
    names, images = _entries(folder)
    paths = [f"{relative}/{name}" for name in images]
    for name in names:
        paths += _walk(root, f"{relative}/{name}", above | {identity})
    return paths
