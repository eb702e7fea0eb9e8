"""Grids of images and their files."""

import numpy as np
import pytest
from PIL import Image

from ear.data.pictures import grid, magnify, readable_scale, save_png


def flat(*values: int, height: int = 2, width: int = 3) -> np.ndarray:
    """One image of a single grey per value."""
    return np.stack([np.full((height, width, 3), value, np.uint8) for value in values])


def test_images_stand_in_rows_on_white():
    picture = grid(flat(1, 2, 3), columns=2, scale=1, pad=1)
    assert picture[..., 0].tolist() == [
        [255] * 9,
        [255, 1, 1, 1, 255, 2, 2, 2, 255],
        [255, 1, 1, 1, 255, 2, 2, 2, 255],
        [255] * 9,
        [255, 3, 3, 3, 255, 255, 255, 255, 255],
        [255, 3, 3, 3, 255, 255, 255, 255, 255],
        [255] * 9,
    ]
    assert (picture[..., 0] == picture[..., 2]).all()


def test_small_images_are_magnified_smoothly():
    ramp = np.linspace(40, 200, 8).round().astype(np.uint8)
    images = np.stack([np.broadcast_to(values[..., None], (8, 8, 3)) for values in np.meshgrid(ramp, ramp)])
    large = magnify(images, 4)
    assert large.shape == (2, 32, 32, 3)
    inner = large[0, 16, 6:26, 0].astype(int)
    assert set(np.diff(inner)) <= {5, 6}  # a ramp of 160 / 7 levels per pixel stays one, without steps of whole pixels
    assert np.array_equal(large[1], large[0].transpose(1, 0, 2))
    assert np.array_equal(magnify(images, 1), images)


@pytest.mark.parametrize(("size", "scale"), [(1, 64), (8, 8), (16, 4), (28, 3), (63, 2), (64, 1), (256, 1)])
def test_small_images_are_brought_to_a_readable_size(size, scale):
    assert readable_scale(size) == scale
    picture = grid(flat(0, height=size, width=size), columns=1, pad=1)
    assert picture.shape == (size * scale + 2, size * scale + 2, 3)


@pytest.mark.parametrize(("count", "columns"), [(0, 3), (2, 0)])
def test_an_empty_grid_is_refused(count, columns):
    with pytest.raises(ValueError, match=f"{count} images in {columns} columns"):
        grid(np.zeros((count, 2, 2, 3), np.uint8), columns)


def test_files_hold_the_pixels_and_always_the_same_bytes(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for name in ("a.png", "deeper/b.png"):
        save_png(tmp_path / name, picture)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "deeper/b.png").read_bytes()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture)


def test_a_failed_write_leaves_the_old_picture(tmp_path):
    save_png(tmp_path / "a.png", flat(1)[0])
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(TypeError):
        save_png(tmp_path / "a.png", np.zeros((2, 2, 7), np.float64))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before
