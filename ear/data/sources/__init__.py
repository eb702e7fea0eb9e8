"""Sources of raw images: class folders, ImageNet (unpacked, in Kaggle's layout, or in its official archives), arrays.

`find` recognises the layout and lists the images; `write_digits` writes the built-in example. One file per layout;
`listing` has what they share, `imagenet` the facts about ImageNet's files.
"""

from pathlib import Path

from ear.data.sources import archives, arrays, imagenet, trees
from ear.data.sources.arrays import unpack
from ear.data.sources.digits import write_digits
from ear.data.sources.listing import EXTENSIONS, Source
from ear.errors import UserError

__all__ = ["EXTENSIONS", "Source", "check_kind", "find", "is_imagenet", "unpack", "write_digits"]


def find(path: str | Path, *, val_fraction: float) -> Source:
    """List the images at a path. Its layout is the first that fits:

    - PATH/train/CLASS/**, with or without PATH/val/CLASS/**. If the classes are ImageNet's, the images of PATH/val may
      lie side by side; Kaggle's table or the development kit, at PATH or above, then gives their classes.
    - PATH/ILSVRC/Data/CLS-LOC/{train,val}, Kaggle's layout of ImageNet.
    - PATH/ILSVRC2012_img_train.tar, with or without ILSVRC2012_img_val.tar (which needs the development kit).
    - The idx files of the MNIST family in PATH, or PATH itself an npz file: `ear.data.sources.arrays`.
    - PATH/CLASS/**.

    Without validation images, `val_fraction` of each class is held out. Writes nothing; reads only the headers of
    archives, and the headers and labels of arrays. Raises UserError naming the file or folder that is wrong.
    """
    root = Path(path)
    if root.is_file() and root.suffix == ".npz":
        return arrays.find_npz(root, val_fraction=val_fraction)
    if root.is_file():
        raise UserError(f"{root} is a file, but must be a folder or an .npz file; give the folder that contains it.")
    if not root.is_dir():
        raise UserError(f"there is no file or folder {root}; set data.path to your class folders, or to an npz file.")
    if not (root / "train").is_dir():
        if (root / imagenet.KAGGLE / "train").is_dir():
            return trees.find(root / imagenet.KAGGLE, val_fraction=val_fraction)
        if (root / imagenet.TRAIN_ARCHIVE).exists():
            return archives.find(root, val_fraction=val_fraction)
        if (root / imagenet.VAL_ARCHIVE).exists():
            raise UserError(f"{root} has {imagenet.VAL_ARCHIVE} but no {imagenet.TRAIN_ARCHIVE}; put it there too.")
        if arrays.idx_files(root):
            return arrays.find_idx(root, val_fraction=val_fraction)
        if (files := sorted(root.glob("*.npz"))) and not any(path.is_dir() for path in root.iterdir()):
            raise UserError(f"{root} has no class folders, but {files[0].name}; name that file.")
    return trees.find(root, val_fraction=val_fraction)


def is_imagenet(source: Source) -> bool:
    """Whether the classes are ImageNet's 1000, so that labels equal the published ones."""
    return len(source.classes) == imagenet.CLASSES and imagenet.are_wnids(source.classes)


def check_kind(source: Source, kind: str) -> None:
    """Raise UserError unless data.source, `kind`, is what was found: folder, imagenet, idx or npz."""
    if source.kind != ("folder" if kind == "imagenet" else kind):
        raise UserError(
            f"data.source is {kind}, but {source.root} holds {source.layout}; set data.source to {source.kind}."
        )
    if kind == "imagenet" and not is_imagenet(source):
        raise UserError(
            f"data.source is imagenet, but {source.root} has {len(source.classes)} classes (such as "
            f"{source.classes[0]!r}), not the {imagenet.CLASSES} of ImageNet; complete it, or use what is "
            "there with data.source=folder."
        )
