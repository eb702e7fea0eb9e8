"""Reading prepared images back: order, laziness, other processes, damage."""

import multiprocessing
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from ear.data.prepared import PreparedImages
from ear.files.json_files import write_json

SIZE, CLASSES = 4, ["cat", "dog"]


def shard(path: Path, images: np.ndarray, labels: np.ndarray, *, compression: str = "none", **attributes) -> None:
    """A shard as plain h5py writes it."""
    layout = {"chunks": (1, SIZE, SIZE, 3), "compression": "gzip"} if compression == "gzip" else {}
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=images, **(layout if len(images) else {}))
        file.create_dataset("labels", data=labels.astype(np.int32))
        file.attrs.update({"format": "ear-prepared-1", "image_size": SIZE} | attributes)


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


LENGTHS = (7, 0, 5, 1)  # a shard all of whose images were rejected is empty
ALL = pixels(sum(LENGTHS))
LABELS = np.arange(len(ALL)) % 2


@pytest.fixture(params=["none", "gzip"])
def folder(request, tmp_path) -> Path:
    """13 training images in four shards, one held-out image."""
    ends = np.cumsum(LENGTHS)
    for k, (length, end) in enumerate(zip(LENGTHS, ends, strict=True)):
        rows = slice(end - length, end)
        shard(tmp_path / f"train-{k:05d}-of-00004.h5", ALL[rows], LABELS[rows], compression=request.param)
    shard(tmp_path / "val-00000-of-00001.h5", ALL[:1], LABELS[:1], compression=request.param)
    write_json(tmp_path / "classes.json", {"classes": CLASSES})
    return tmp_path


def test_what_is_known_without_reading_an_image(folder):
    train, val = (PreparedImages(folder, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (13, 1)
    assert train.image_size == SIZE
    assert list(train.classes) == CLASSES
    assert train.labels.dtype == np.int64
    assert np.array_equal(train.labels, LABELS)


@pytest.mark.parametrize("rows", [range(13), [12], [3, 3, 11, 0, 7, 6, 12, 3], [], np.array([8, 2], np.int32)])
def test_rows_come_in_the_order_asked_for(folder, rows):
    found = PreparedImages(folder, "train").images(rows)
    assert found.dtype == np.uint8
    assert np.array_equal(found, ALL[np.asarray(rows, dtype=np.int64)])


@pytest.mark.parametrize("rows", [[-1], [13], [0, 100]])
def test_rows_beyond_the_end_are_refused(folder, rows):
    with pytest.raises(IndexError, match=r"outside 0\.\.12"):
        PreparedImages(folder, "train").images(rows)


@pytest.mark.parametrize("size", [1, 4, 13, 100])
def test_batches_hold_everything_once_in_order(folder, size):
    batches = list(PreparedImages(folder, "train").batches(size))
    assert [len(images) for images, _ in batches[:-1]] == [size] * (len(batches) - 1)
    assert np.array_equal(np.concatenate([images for images, _ in batches]), ALL)
    assert np.array_equal(np.concatenate([labels for _, labels in batches]), LABELS)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(folder, method):
    train = PreparedImages(folder, "train")
    train.images([0, 12])
    parts = [[12, 0], [5, 6, 7], list(range(13))]
    with multiprocessing.get_context(method).Pool(2) as pool:
        for part, found in zip(parts, pool.map(train.images, parts), strict=True):
            assert np.array_equal(found, ALL[part])


def test_no_image_is_held_in_memory_and_no_file_open(folder):
    train = PreparedImages(folder, "train")
    before = len(list(Path("/proc/self/fd").iterdir()))
    train.images(range(13))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert ALL[3].tobytes() not in pickle.dumps(train)


def test_missing_things_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"nowhere/classes\.json does not exist"):
        PreparedImages(folder / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"has no test images \(test-00000-of-\*\.h5\); run the prepare stage"):
        PreparedImages(folder, "test")
    (folder / "train-00002-of-00004.h5").unlink()
    with pytest.raises(FileNotFoundError, match=r"not complete: see .*train-00002-of-00004\.h5"):
        PreparedImages(folder, "train")


def test_shards_of_two_runs_are_not_mixed(folder):
    shard(folder / "train-00000-of-00001.h5", ALL, LABELS)
    with pytest.raises(FileNotFoundError, match="not complete"):
        PreparedImages(folder, "train")


def test_damaged_and_foreign_shards_are_named(folder):
    path = folder / "train-00002-of-00004.h5"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"no HDF5"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train-00002-of-00004\.h5 is not a readable shard of images"):
            PreparedImages(folder, "train")
    shard(path, ALL[:2], LABELS[:2], format="ear-prepared-9")
    with pytest.raises(ValueError, match="has format 'ear-prepared-9', but must have 'ear-prepared-1'"):
        PreparedImages(folder, "train")
    shard(path, ALL[:2], LABELS[:3])
    with pytest.raises(ValueError, match=r"holds images uint8 \(2, 4, 4, 3\) and 3 labels"):
        PreparedImages(folder, "train")
    shard(path, np.zeros((2, 8, 8, 3), np.uint8), LABELS[:2], image_size=8)
    with pytest.raises(ValueError, match="several image sizes"):
        PreparedImages(folder, "train")


def test_a_file_cut_short_while_in_use_is_named(tmp_path):
    shard(tmp_path / "train-00000-of-00001.h5", ALL, LABELS)
    write_json(tmp_path / "classes.json", {"classes": CLASSES})
    train = PreparedImages(tmp_path, "train")
    with (tmp_path / "train-00000-of-00001.h5").open("r+b") as file:
        file.truncate(2048 + 100)
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.h5 ends before image 12"):
        train.images([12])
