"""Images in arrays: idx files and npz, from the file to prepared rows; damaged or foreign ones."""

import gzip
import io
import re
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ear.data import manifest, preparation, sources
from ear.data.images import Encoding
from ear.data.preparation import Layout
from ear.data.prepared import PreparedImages
from ear.errors import UserError


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


IMAGES = random_images(12, 6, 5)
LABELS = np.arange(12, dtype=np.uint8) % 3
HELD = random_images(3, 6, 5, seed=1)


def write_idx(folder: Path, end: str = "", mark: str = "-", **changed: bytes) -> Path:
    """The four files, plain or gzipped; `changed` replaces the content of some."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"train_images": IMAGES, "train_labels": LABELS, "t10k_images": HELD, "t10k_labels": LABELS[:3]}
    for name, values in files.items():
        content = changed.get(name, idx(values))
        path = folder / f"{name.replace('_', '-')}{mark}idx{values.ndim}-ubyte{end}"
        path.write_bytes(gzip.compress(content) if end else content)
    return folder


def npz(path: Path, compress: bool = False, **arrays: np.ndarray) -> Path:
    (np.savez_compressed if compress else np.savez)(path, **arrays)
    return path


def prepared(path: Path, folder: Path, compression: str = "none", size: int = 5) -> dict[str, PreparedImages]:
    """List, unpack and prepare, as the stages do."""
    source = sources.find(path, val_fraction=0.25)
    (raw := folder / "data/raw").mkdir(parents=True)
    sources.unpack(source.arrays, raw)
    manifest.write_manifest(
        raw, source.images, tree=raw, root=raw, names={}, encoding=Encoding(pixels=source.arrays[0].shape[1:])
    )
    (folder / "scratch").mkdir()
    preparation.prepare(
        manifest.read_manifest(raw),
        scratch=folder / "scratch",
        target=folder / "data/prepared",
        rejected_list=folder / "rejected.csv",
        layout=Layout(size, 8, compression),
        max_rejected=0,
        workers=0,
    )
    return {split: PreparedImages(folder / "data/prepared", split) for split in ("train", "val")}


def by_label(images: PreparedImages) -> dict[int, set[bytes]]:
    rows = images.images(range(len(images)))
    return {label: {rows[k].tobytes() for k in np.flatnonzero(images.labels == label)} for label in set(images.labels)}


def expected(images: np.ndarray, labels: np.ndarray) -> dict[int, set[bytes]]:
    """Square RGB images by label: arrays here have 5 columns and 6 rows, of which the centre crop keeps the first 5."""
    square = images[:, :5]
    rgb = np.repeat(square[..., None], 3, 3) if square.ndim == 3 else square
    return {k: {image.tobytes() for image in rgb[labels == k]} for k in set(labels.tolist())}


@pytest.mark.parametrize(
    ("end", "mark", "compression"), [("", "-", "none"), (".gz", "-", "links"), (".gz", ".", "gzip")]
)
def test_idx_files_give_their_pixels_and_labels(tmp_path, end, mark, compression):
    found = prepared(write_idx(tmp_path / "in", end, mark), tmp_path, compression)
    assert by_label(found["train"]) == expected(IMAGES, LABELS)
    assert by_label(found["val"]) == expected(HELD, LABELS[:3])
    assert found["train"].classes == ("0", "1", "2")


@pytest.mark.parametrize("compress", [False, True])
def test_npz_in_colour_with_held_out_images(tmp_path, compress):
    """MedMNIST's form: labels [N, 1], and two parts that are held out."""
    colour, val, test = (random_images(n, 6, 5, 3, seed=n) for n in (12, 4, 5))
    labels = {"train": np.arange(12) % 2, "val": np.arange(4) % 2, "test": np.arange(5) % 2}
    arrays = {"train_images": colour, "val_images": val, "test_images": test}
    columns = {f"{part}_labels": values[:, None].astype(np.uint8) for part, values in labels.items()}
    found = prepared(npz(tmp_path / "x.npz", compress, **arrays, **columns), tmp_path)
    assert by_label(found["train"]) == expected(colour, labels["train"])
    both = np.concatenate([val, test]), np.concatenate([labels["val"], labels["test"]])
    assert by_label(found["val"]) == expected(*both)


def test_npz_without_held_out_images(tmp_path):
    """A channel of one is grey; a quarter of each class is held out; labels of two digits keep their order."""
    labels = np.repeat([2, 10], 8)
    images = random_images(16, 6, 5, 1)
    found = prepared(npz(tmp_path / "x.npz", images=images, labels=labels), tmp_path)
    assert found["train"].classes == ("02", "10")
    assert np.bincount(found["val"].labels).tolist() == [2, 2]
    train, val = by_label(found["train"]), by_label(found["val"])
    assert {k: train[k] | val[k] for k in (0, 1)} == expected(images[..., 0], labels // 10)


def test_paths_say_part_class_and_place(tmp_path):
    source = sources.find(write_idx(tmp_path), val_fraction=0.5)
    assert source.layout == "idx files"
    assert source.has_val
    assert [image for image in source.images if image.path.endswith("/07")] == [
        manifest.ListedImage("train", "1", "train/1/07", "train.pixels", 7 * 30, 30)
    ]
    assert [image.path for image in source.images if image.split == "val"] == ["t10k/0/0", "t10k/1/1", "t10k/2/2"]


IDX_FAULTS = {
    "label for each": ({"train_labels": idx(LABELS[:11])}, "has 11 labels for 12 images; give every image one."),
    "no idx": (
        {"train_images": b"\x89PNG, and more bytes than a header"},
        "is not an idx file of bytes in 3 dim",
    ),
    "floats": ({"train_images": b"\0\0\x0d\x03" + idx(IMAGES)[4:]}, "is not an idx file of bytes"),
    "short labels": ({"train_labels": idx(LABELS)[:-2]}, "ends early, judging by its header, [12]; save or download"),
    "long labels": ({"t10k_labels": idx(LABELS[:3]) + b"x"}, "continues after its last label, judging by its header"),
    "short images": ({"train_images": idx(IMAGES)[:-7]}, "ends 7 bytes early, judging by its header, [12, 6, 5]"),
    "long images": (
        {"t10k_images": idx(HELD) + b"x"},
        "continues after its last image, judging by its header, [3, 6, 5]",
    ),
    "other shape": ({"t10k_images": idx(HELD[:, :5])}, "has images of [5, 5], "),
    "new class": ({"t10k_labels": idx(LABELS[:3] + 1)}, "has class 3, which "),
    "no images": ({"t10k_images": idx(HELD[:0]), "t10k_labels": idx(LABELS[:0])}, "is [0, 6, 5], but must be"),
}


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("fault", IDX_FAULTS)
def test_wrong_idx_files_are_refused_in_a_sentence(tmp_path, fault, end):
    changed, sentence = IDX_FAULTS[fault]
    with pytest.raises(UserError, match=re.escape(sentence)):
        sources.unpack(sources.find(write_idx(tmp_path, end, **changed), val_fraction=0.5).arrays, tmp_path)


@pytest.mark.parametrize("name", ["train-images-idx3", "train-labels-idx1"])
@pytest.mark.parametrize("cut", [5, 25, -4])
def test_a_truncated_or_altered_gzip_file_is_refused(tmp_path, name, cut):
    path = write_idx(tmp_path, ".gz") / f"{name}-ubyte.gz"
    content = path.read_bytes()
    path.write_bytes(content[:cut] if cut > 0 else content[:cut] + bytes(4))  # -4: the checksum's end
    with pytest.raises(UserError, match=rf"{name}-ubyte.gz is damaged \(.*\); save or download it again"):
        sources.unpack(sources.find(tmp_path, val_fraction=0.5).arrays, tmp_path)


def test_a_missing_idx_file_is_named(tmp_path):
    (write_idx(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"lacks t10k-labels-idx1-ubyte, plain or \.gz; put it there"):
        sources.find(tmp_path, val_fraction=0.5)


NPZ_FAULTS = {
    "no labels": ({"images": IMAGES}, "has no array 'labels', only images; add it."),
    "half": (
        {"images": IMAGES, "labels": LABELS, "val_images": HELD},
        "has no array 'val_labels', only images, labels",
    ),
    "both": ({"images": IMAGES, "labels": LABELS, "train_images": HELD}, "has both 'images' and 'train_images'"),
    "floats": (
        {"images": IMAGES / 255, "labels": LABELS},
        "images is float64, but must be uint8 (0..255); convert it.",
    ),
    "channels": (
        {"images": random_images(12, 4, 4, 4), "labels": LABELS},
        "but must be [N, H, W] or [N, H, W, C]",
    ),
    "vectors": ({"images": random_images(12, 4), "labels": LABELS}, "is [12, 4], but must be [N, H, W] or"),
    "several": ({"images": IMAGES, "labels": np.ones((12, 14), int)}, "labels is int64 [12, 14], but must be integers"),
    "negative": ({"images": IMAGES, "labels": LABELS.astype(int) - 1}, "has label -1, but labels must be 0 .. 999999"),
    "names": ({"images": IMAGES, "labels": np.array(["cat"] * 12)}, "but must be integers [N] or [N, 1]"),
    "large": ({"images": IMAGES, "labels": LABELS + np.uint64(2**63)}, "has label 9223372036854775810, but labels"),
    "objects": ({"images": IMAGES, "labels": np.array([None] * 12)}, "holds objects or is in Fortran's order"),
    "columns": ({"images": np.asfortranarray(IMAGES), "labels": LABELS}, "holds objects or is in Fortran's order"),
}


@pytest.mark.parametrize("fault", NPZ_FAULTS)
def test_wrong_arrays_are_refused_in_a_sentence(tmp_path, fault):
    arrays, sentence = NPZ_FAULTS[fault]
    with pytest.raises(UserError, match=re.escape(sentence)):
        sources.find(npz(tmp_path / "x.npz", **arrays), val_fraction=0.5)


def test_a_damaged_npz_is_refused(tmp_path):
    path = npz(tmp_path / "x.npz", images=IMAGES, labels=LABELS)
    content = bytearray(path.read_bytes())
    content[content.index(IMAGES.tobytes()[:50]) + 20] ^= 1  # a pixel
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x.npz is damaged \(Bad CRC-32"):
        sources.unpack(sources.find(path, val_fraction=0.5).arrays, tmp_path)
    path.write_bytes(content[:100])
    with pytest.raises(UserError, match=r"x.npz is damaged \(File is not a zip file\); save or download it again"):
        sources.find(path, val_fraction=0.5)


def npz_of(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def npy(values: np.ndarray | None = None, header: str = "") -> bytes:
    """An npy file; only its header, with this text, if there are no values."""
    content = io.BytesIO()
    if values is not None:
        np.save(content, values)
    else:
        text = header.encode() + b"\n"
        content.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    return content.getvalue()


def described(shape: str, kind: str = "|u1") -> str:
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}"


FOREIGN = {
    "no .npy": ({"images": npy(IMAGES), "labels": npy(LABELS)}, "has no array 'images', only nothing; add it."),
    "cut header": ({"images.npy": npy(header="{'descr': '|u1', 'shape': ("), "labels.npy": npy(LABELS)}, "is damaged"),
    "odd header": ({"images.npy": npy(header="{[]:1}"), "labels.npy": npy(LABELS)}, "is damaged"),
    "below 0": (
        {"images.npy": npy(header=described("(12, -6, -5)")), "labels.npy": npy(LABELS)},
        "a size below 0",
    ),
    "terabyte": (
        {"images.npy": npy(header=described("(137438953472, 6, 5)")), "labels.npy": npy(LABELS)},
        "has 12 labels for 137438953472 images",
    ),
    "both large": (
        {
            "images.npy": npy(header=described("(1048576, 6, 5)")),
            "labels.npy": npy(header=described("(1048576,)", "<i8")),
        },
        "labels ends early, judging by its header, [1048576]; save or download it again.",
    ),
}


@pytest.mark.parametrize("fault", FOREIGN)
def test_foreign_zip_files_are_refused_in_a_sentence(tmp_path, fault):
    members, sentence = FOREIGN[fault]
    with pytest.raises(UserError, match=re.escape(sentence)):
        sources.find(npz_of(tmp_path / "x.npz", members), val_fraction=0.5)


def test_a_folder_with_an_npz_says_to_name_the_file(tmp_path):
    npz(tmp_path / "x.npz", images=IMAGES, labels=LABELS)
    with pytest.raises(UserError, match=r"has no class folders, but x\.npz; name that file\."):
        sources.find(tmp_path, val_fraction=0.5)
    with pytest.raises(UserError, match=r"there is no file or folder .*y\.npz; set data\.path to"):
        sources.find(tmp_path / "y.npz", val_fraction=0.5)


def test_nothing_is_unpacked_on_a_disk_that_is_too_small(tmp_path, monkeypatch):
    source = sources.find(npz(tmp_path / "x.npz", images=IMAGES, labels=LABELS), val_fraction=0.5)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=300))
    with pytest.raises(UserError, match="free some space"):
        sources.unpack(source.arrays, tmp_path / "raw")
    assert list((tmp_path / "raw").iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [("folder", "data.source is folder, but .* holds idx files; set data.source to idx."), ("idx", None)],
)
def test_the_source_is_the_one_that_the_parameters_name(tmp_path, kind, sentence):
    source = sources.find(write_idx(tmp_path), val_fraction=0.5)
    if sentence is None:
        sources.check_kind(source, kind)
    else:
        with pytest.raises(UserError, match=sentence):
            sources.check_kind(source, kind)
