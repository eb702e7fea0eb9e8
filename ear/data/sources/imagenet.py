"""Facts about ImageNet (ILSVRC 2012): its files, its counts, and the class of each validation image.

Classes are named by WordNet ids ("wnids", such as n01440764); label k is the k-th of the 1000 in sorted order.
Validation images have no class folders: the development kit or Kaggle's table gives their classes.
"""

import csv
import io
import re
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ear.errors import UserError
from ear.files.reading import reading

CLASSES, TRAIN_IMAGES, VAL_IMAGES = 1000, 1_281_167, 50_000
TRAIN_ARCHIVE, VAL_ARCHIVE = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
KAGGLE = "ILSVRC/Data/CLS-LOC"
_KIT, _TABLE, _NAMES = "ILSVRC2012_devkit_t12", "LOC_val_solution.csv", "LOC_synset_mapping.txt"
_KIT_FILES = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
_MOST_BYTES = 1 << 26  # of a file of the kit; the real ones have less than 1 MB


@dataclass(frozen=True)
class Truth:
    """Classes of the validation images (file name without suffix => wnid), and human-readable names (wnid => name)."""

    origin: Path
    wnids: Mapping[str, str]
    names: Mapping[str, str]


def are_wnids(names: Iterable[str]) -> bool:
    """Whether all names are WordNet ids."""
    return all(re.fullmatch(r"n\d{8}", name) for name in names)


def find_truth(root: Path) -> Truth | None:
    """The truth found in `root` or one of the three folders above it, or None.

    It is Kaggle's LOC_val_solution.csv (with names from LOC_synset_mapping.txt) or the development kit, packed or
    unpacked. Raises UserError if one exists but cannot be read.
    """
    for place in [root, *root.absolute().parents[:3]]:
        if (place / _TABLE).is_file():
            return Truth(place / _TABLE, _read_table(place / _TABLE), _read_names(place / _NAMES))
        for kit in (place / _KIT / "data", place / "data", place / f"{_KIT}.tar.gz"):
            if kit.is_file() or (kit / _KIT_FILES[1]).is_file():
                return _read_kit(kit)
    return None


def require_truth(truth: Truth | None, root: Path, images: Path) -> Truth:
    """Return the truth found for `root`; raises UserError if there is none for the validation `images`."""
    if truth is None:
        raise UserError(
            f"{images} has validation images without class folders, and nothing says their classes; put {_KIT}.tar.gz "
            f"or Kaggle's {_TABLE} into {root}."
        )
    return truth


def class_of(image: str, truth: Truth) -> str:
    """The wnid of a validation image, by its file name. Raises UserError if the truth does not have it."""
    wnid = truth.wnids.get(PurePosixPath(image).stem)
    if wnid is None:
        raise UserError(f"{truth.origin} does not say the class of validation image {image}; remove one or the other.")
    return wnid


def _read_table(path: Path) -> dict[str, str]:
    """Read lines of ImageId, PredictionString; the latter is a wnid and a box, once or several times."""
    with reading(path, "table", "download it again"), path.open(newline="") as file:
        lines = csv.DictReader(file)
        if lines.fieldnames != ["ImageId", "PredictionString"]:
            raise UserError(f"{path} does not have the columns ImageId,PredictionString; download it again.")
        wnids = {line["ImageId"]: (line["PredictionString"] or "").partition(" ")[0] for line in lines}
    wrong = next((image for image, wnid in wnids.items() if not are_wnids([wnid])), None)
    if wrong is not None:
        raise UserError(f"{path} says class {wnids[wrong]!r} for {wrong}, which is no WordNet id; download it again.")
    return wnids


def _read_names(path: Path) -> dict[str, str]:
    """Read lines of a wnid, a space and names; empty if the file does not exist."""
    with reading(path, "list of class names", "download it again"):
        lines = path.read_text().splitlines() if path.is_file() else []
    return {wnid: names for wnid, _, names in (line.partition(" ") for line in lines)}


def _read_kit(path: Path) -> Truth:
    """Read the development kit, from its archive or its unpacked folder `data`.

    meta.mat has `synsets`, a structure array with one entry per class: ILSVRC2012_ID, WNID, words and more. Line k of
    the ground truth is the ILSVRC2012_ID of validation image k, counted from 1.
    """
    from scipy.io import loadmat

    files = _unpacked(path) if path.is_dir() else _packed(path)
    try:
        synsets = loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"].reshape(-1)
        wnids = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in synsets}
        names = {str(entry["WNID"]): str(entry["words"]) for entry in synsets}
        truth = [wnids[int(line)] for line in files[_KIT_FILES[1]].split()]
    except Exception as error:  # damaged bytes make the reader of mat files raise errors of many kinds
        raise UserError(f"{path} is not a readable development kit ({error!r}); download it again.") from error
    return Truth(path, {f"ILSVRC2012_val_{k:08d}": wnid for k, wnid in enumerate(truth, 1)}, names)


def _unpacked(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in _KIT_FILES}


def _packed(path: Path) -> dict[str, bytes]:
    """The contents of the two files needed, by name."""
    found = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if member.isreg() and name in _KIT_FILES:
                    if member.size > _MOST_BYTES:
                        raise UserError(
                            f"{path}: {member.name} has {member.size} bytes, more than any real one; download it again."
                        )
                    content = archive.extractfile(member)
                    assert content is not None  # a regular file
                    found[name] = content.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); download it again.") from error
    if missing := [name for name in _KIT_FILES if name not in found]:
        raise UserError(f"{path} has no {missing[0]}; download it again.")
    return found
