"""ImageNet in small: three classes, in every form in which people have it, with the real names and formats of files."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

WNIDS = ("n01440764", "n01443537", "n02119789")
NAMES = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus", "n02119789": "kit fox"}
_IDS = {2: "n01440764", 3: "n01443537", 1: "n02119789", 1001: "n00004475"}  # as in the kit, not in the order of wnids
_VAL = {k: WNIDS[k % 3] for k in range(1, 7)}  # class by number of the validation image


def jpeg(seed: int, height: int = 9, width: int = 12) -> bytes:
    """An image file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def train_images() -> dict[str, dict[str, bytes]]:
    """File name and content, by wnid."""
    return {wnid: {f"{wnid}_{k}.JPEG": jpeg(10 * number + k) for k in range(4)} for number, wnid in enumerate(WNIDS)}


def val_images() -> dict[str, bytes]:
    """File name and content."""
    return {f"ILSVRC2012_val_{k:08d}.JPEG": jpeg(100 + k) for k in _VAL}


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def write_tree(root: Path) -> Path:
    """train/WNID/ and val/WNID/."""
    for wnid, files in train_images().items():
        write(root / "train" / wnid, files)
    for number, (name, content) in enumerate(val_images().items(), 1):
        write(root / "val" / _VAL[number], {name: content})
    return root


def write_flat_tree(root: Path) -> Path:
    """train/WNID/, val/ without class folders, and the unpacked development kit."""
    for wnid, files in train_images().items():
        write(root / "train" / wnid, files)
    write(root / "val", val_images())
    write(root / "ILSVRC2012_devkit_t12/data", kit())
    return root


def write_kaggle(root: Path) -> Path:
    """ILSVRC/Data/CLS-LOC/{train,val,test} and the tables."""
    data = root / "ILSVRC/Data/CLS-LOC"
    for wnid, files in train_images().items():
        write(data / "train" / wnid, files)
    write(data / "val", val_images())
    write(data / "test", {"ILSVRC2012_test_00000001.JPEG": jpeg(999)})
    lines = [
        f"ILSVRC2012_val_{k:08d},{wnid} 1 2 3 4 {wnid if k == 2 else ''} 5 6 7 8 " for k, wnid in reversed(_VAL.items())
    ]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]) + "\n")
    mapping = [f"{wnid} {names}" for wnid, names in NAMES.items()]
    (root / "LOC_synset_mapping.txt").write_text("\n".join(mapping) + "\n")
    return root


def write_archives(root: Path) -> Path:
    """The official archives and the packed development kit."""
    root.mkdir(parents=True, exist_ok=True)
    classes = {f"{wnid}.tar": tar(files) for wnid, files in train_images().items()}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar(classes))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar(val_images()))
    inside = {f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in kit().items()}
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar(inside, mode="w:gz"))
    return root


def tar(
    files: dict[str, bytes], *, mode: str = "w", form: int = tarfile.USTAR_FORMAT, **more: tarfile.TarInfo
) -> bytes:
    """A tar archive of files, and of members without content."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode, format=form) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1338537600
            archive.addfile(member, io.BytesIO(data))
        for member in more.values():
            archive.addfile(member)
    return content.getvalue()


def kit() -> dict[str, bytes]:
    """The two files of the development kit that matter, as MATLAB wrote them."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    synsets = np.zeros((len(_IDS), 1), [(name, object) for name in (*fields, "num_train_images")])
    for entry, (number, wnid) in zip(synsets[:, 0], sorted(_IDS.items()), strict=True):
        leaf = number <= 1000
        entry["ILSVRC2012_ID"], entry["WNID"] = np.array([[float(number)]]), wnid
        entry["words"], entry["gloss"] = NAMES.get(wnid, "organism, being"), "a living thing"
        entry["num_children"] = np.array([[0.0 if leaf else 3.0]])
        entry["children"] = np.zeros((1, 0)) if leaf else np.array([[1.0, 2.0, 3.0]])
        entry["wordnet_height"], entry["num_train_images"] = np.array([[0.0]]), np.array([[1300.0]])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    numbers = {wnid: number for number, wnid in _IDS.items()}
    truth = "".join(f"{numbers[wnid]}\n" for wnid in _VAL.values())
    return {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth.encode()}
