"""The file of generated images: its layout, its writing in any order, its reading."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from ear.sampling import samples
from ear.sampling.samples import GeneratedImages

ROOT = Path(__file__).parents[2]
SAMPLING = {"classes": ["a", "b"], "steps": 4, "seed": 7}


def pictures(count: int, size: int = 8) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (count, size, size, 3), dtype=np.uint8)


def written(path: Path, images: np.ndarray, starts: list[int], size: int) -> Path:
    """A whole file whose batches of `size` were written in the order of `starts`."""
    labels = [k % 2 for k in range(len(images))]
    samples.create(path, labels=labels, image_shape=images.shape[1:], sampling=SAMPLING)
    for start in starts:
        samples.write(path, start, images[start : start + size])
    return path


def foreign(path: Path, images: np.ndarray, labels=None, **changes) -> Path:
    """A file that h5py alone wrote."""
    with h5py.File(path, "w") as file:
        file["images"] = images
        file["labels"] = np.arange(len(images), dtype=np.int32) % 2 if labels is None else labels
        file.attrs.update({"format": samples.FORMAT, "sampling": json.dumps(SAMPLING)} | changes)
    return path


def test_plain_h5py_reads_what_was_written(tmp_path):
    images = pictures(10)
    path = written(tmp_path / "samples.h5", images, [8, 0, 4], 4)
    with h5py.File(path) as file:
        assert np.array_equal(file["images"], images)
        assert file["images"].dtype == np.uint8
        assert file["labels"].dtype == np.int32
        assert file["labels"][:].tolist() == [0, 1] * 5
        assert file["seed"][()] == 7
        assert file.attrs["format"] == "ear-samples-1"
        assert json.loads(file.attrs["sampling"]) == SAMPLING


def test_order_and_size_of_the_batches_leave_no_trace(tmp_path):
    images = pictures(10)
    one = written(tmp_path / "one.h5", images, [0], 10)
    other = written(tmp_path / "other.h5", images, [9, 3, 0, 6, 3], 3)  # a batch written twice, as after a kill
    assert one.read_bytes() == other.read_bytes()


def test_a_full_disk_is_noticed_before_anything_is_drawn(tmp_path):
    """In a process whose files may not grow beyond 2 MB, which stands for a small disk."""
    program = (
        "import resource\n"
        "from ear.sampling import samples\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
        "options = {'labels': [0] * 1000, 'image_shape': (32, 32, 3), 'sampling': {'seed': 0}}\n"
        "try:\n"
        "    samples.create('samples.h5', **options)\n"
        "except OSError as error:\n"
        "    print(error.strerror)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert run.stdout.startswith("0.00412 GB of images do not fit (File too large)"), run.stderr
    assert list(tmp_path.iterdir()) == []


def test_blocks_are_runs_of_equal_length(tmp_path):
    images = pictures(12)
    made = GeneratedImages(written(tmp_path / "samples.h5", images, [0], 12))
    assert (len(made), made.image_size, made.sampling) == (12, 8, SAMPLING)
    blocks = made.blocks(3)
    assert [len(block) for block in blocks] == [4, 4, 4]
    assert np.array_equal(np.concatenate([block.images(range(0, 4)) for block in blocks]), images)
    assert np.array_equal(blocks[1].images(range(1, 3)), images[5:7])
    assert blocks[2].labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(ValueError, match=r"evaluate\.repeats is 5, but must divide the 12 images .* such as 10\.$"):
        made.blocks(5)
    with pytest.raises(ValueError, match=r"evaluate\.repeats is 13, but must divide the 12 images .* such as 13\.$"):
        made.blocks(13)


@pytest.mark.parametrize(
    ("images", "labels", "changes", "message"),
    [
        (pictures(0), None, {}, "holds no images; raise sample.count"),
        (pictures(2), None, {"format": "other-1"}, "has format 'other-1', but must have 'ear-samples-1'"),
        (pictures(2).astype(np.float32), None, {}, r"images float32 \[2, 8, 8, 3\]"),
        (pictures(2)[:, :4], None, {}, r"images uint8 \[2, 4, 8, 3\]"),
        (pictures(2), np.zeros(3, np.int32), {}, "and 3 labels"),
    ],
)
def test_wrong_samples_are_refused(tmp_path, images, labels, changes, message):
    path = foreign(tmp_path / "samples.h5", images, labels, **changes)
    with pytest.raises(ValueError, match=message):
        GeneratedImages(path)


def test_absent_and_broken_samples_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; run the stage"):
        GeneratedImages(tmp_path / "samples.h5")
    (tmp_path / "samples.h5").write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match="not a readable file of samples"):
        GeneratedImages(tmp_path / "samples.h5")
