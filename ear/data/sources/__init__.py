"""Where raw images come from: class folders, or ImageNet unpacked, as Kaggle lays it out, or in its official archives.

`find` tells the layouts apart and lists the images of any of them; `write_digits` makes the embedded example. One file
per layout; what they share is in `listing`, and in `imagenet` what is known of ImageNet's own files.
"""

from pathlib import Path

from ear.data.sources import archives, imagenet, trees
from ear.data.sources.digits import write_digits
from ear.data.sources.listing import EXTENSIONS, Source
from ear.errors import UserError

__all__ = ["EXTENSIONS", "Source", "check_imagenet", "find", "is_imagenet", "write_digits"]


def find(path: str | Path, *, val_fraction: float) -> Source:
    """List the images at a path. Its layout is the first of these that fits:

    - PATH/train/CLASS/** with PATH/val/CLASS/** or without; or, for ImageNet's class names, with the images of PATH/val
      side by side and their classes in Kaggle's table or the development kit, at PATH or above;
    - PATH/ILSVRC/Data/CLS-LOC/{train,val}, as Kaggle lays ImageNet out;
    - PATH/ILSVRC2012_img_train.tar, with ILSVRC2012_img_val.tar and the development kit or without both;
    - PATH/CLASS/**.

    Without validation images `val_fraction` of each class is held out. Nothing is written, and of archives only headers
    are read. Raises ValueError naming the file or folder that is not as it should be.
    """
    root = Path(path)
    if root.is_file():
        raise UserError(f"{root} is a file; name the folder that it lies in.")
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; set data.path to the folder that holds your class folders.")
    if not (root / "train").is_dir():
        if (root / imagenet.KAGGLE / "train").is_dir():
            return trees.find(root / imagenet.KAGGLE, val_fraction=val_fraction)
        if (root / imagenet.TRAIN_ARCHIVE).exists():
            return archives.find(root, val_fraction=val_fraction)
        if (root / imagenet.VAL_ARCHIVE).exists():
            raise UserError(f"{root} has {imagenet.VAL_ARCHIVE} but no {imagenet.TRAIN_ARCHIVE}; put it there too.")
    return trees.find(root, val_fraction=val_fraction)


def is_imagenet(source: Source) -> bool:
    """Whether the classes are those of ImageNet's thousand, so that labels are the published ones."""
    return len(source.classes) == imagenet.CLASSES and imagenet.are_wnids(source.classes)


def check_imagenet(source: Source) -> None:
    """Raise ValueError unless `is_imagenet`."""
    if not is_imagenet(source):
        raise UserError(
            f"data.source is imagenet, but {source.root} has {len(source.classes)} classes (such as "
            f"{source.classes[0]!r}), not the {imagenet.CLASSES} of ImageNet; complete it, or use what is "
            "there with data.source=folder."
        )
