"""Decoding, the published centre crop, and the conversion between pixels and signed images."""

import hashlib
import io
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ear.data.images import center_crop, decode, to_signed, to_uint8

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/center_crop.json").read_text())["crops"]


def encoded(image: Image.Image, form: str = "PNG", **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


JPEG = encoded(Image.fromarray(noise(64, 64, 3)), "JPEG").getvalue()


@pytest.mark.parametrize("name", GOLDEN)
def test_crops_have_the_published_bytes(name):
    from skimage import data

    picture, size = name.split("/")
    crop = center_crop(Image.fromarray(getattr(data, picture)()), int(size))
    golden = GOLDEN[name]
    assert list(crop.shape) == golden["shape"]
    assert crop[0, 0].tolist() == golden["corner"]
    assert hashlib.sha256(crop.tobytes()).hexdigest() == golden["sha256"]


def test_an_image_of_the_right_size_is_left_alone():
    pixels = noise(16, 16, 3)
    assert np.array_equal(center_crop(Image.fromarray(pixels), 16), pixels)


@pytest.mark.parametrize(("height", "width", "top", "left"), [(16, 21, 0, 2), (19, 16, 1, 0)])
def test_only_the_excess_of_the_long_side_is_cut_off(height, width, top, left):
    pixels = noise(height, width, 3)
    assert np.array_equal(center_crop(Image.fromarray(pixels), 16), pixels[top : top + 16, left : left + 16])


@pytest.mark.parametrize("shape", [(37, 53), (53, 37), (16, 90), (90, 17), (9, 14), (14, 9), (200, 131), (5, 5)])
def test_the_crop_is_the_plain_one_of_the_whole_resized_image(shape):
    image = Image.fromarray(noise(*shape, 3))
    crop = center_crop(image, 16)
    while min(image.size) >= 32:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = 16 / min(image.size)
    whole = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = (whole.height - 16) // 2, (whole.width - 16) // 2
    assert np.array_equal(crop, np.asarray(whole)[top : top + 16, left : left + 16])
    assert crop.flags.writeable


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (15, 200), (64, 33)])
def test_crops_are_square_for_every_shape(shape):
    assert center_crop(Image.new("RGB", shape, (7, 8, 9)), 16).tolist() == [[[7, 8, 9]] * 16] * 16


def test_a_thread_of_an_image_is_refused():
    with pytest.raises(ValueError, match="too long and thin: 100000 x 1 pixels for a square of 64"):
        center_crop(Image.new("RGB", (100_000, 1)), 64)


def test_grey_of_sixteen_bits_is_scaled_not_clipped():
    grey = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 255]
    pixels = np.asarray(decode(encoded(Image.fromarray(grey))))
    assert pixels[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize(
    ("mode", "color", "form", "options", "expected"),
    [
        ("1", 1, "PNG", {}, (255, 255, 255)),
        ("L", 100, "PNG", {}, (100, 100, 100)),
        ("L", 100, "PNG", {"transparency": 100}, (255, 255, 255)),
        ("I;16", 700, "PNG", {"transparency": 700}, (255, 255, 255)),
        ("I;16", 25700, "PNG", {"transparency": 700}, (100, 100, 100)),
        ("LA", (100, 0), "PNG", {}, (255, 255, 255)),
        ("LA", (100, 255), "PNG", {}, (100, 100, 100)),
        ("RGBA", (100, 0, 200, 128), "PNG", {}, (177, 127, 227)),
        ("RGBA", (100, 0, 200, 128), "WEBP", {"lossless": True}, (177, 127, 227)),
        ("RGB", (100, 0, 200), "PNG", {"transparency": (100, 0, 200)}, (255, 255, 255)),
        ("RGB", (100, 0, 200), "BMP", {}, (100, 0, 200)),
        ("CMYK", (0, 255, 255, 0), "JPEG", {"quality": 100}, (255, 0, 0)),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(mode, color, form, options, expected):
    image = decode(encoded(Image.new(mode, (4, 4), color), form, **options))
    assert image.mode == "RGB"
    assert np.asarray(image)[2, 1].tolist() == list(expected)


@pytest.mark.parametrize(("options", "expected"), [({}, (255, 0, 0)), ({"transparency": 1}, (255, 255, 255))])
def test_palettes_and_their_transparent_colour(options, expected):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert decode(encoded(image, **options)).getpixel((0, 0)) == expected


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_camera_rotation_is_applied_where_asked(form):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, :8] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held a quarter turn: show rotated clockwise
    content = encoded(Image.fromarray(pixels), form, exif=exif).getvalue()
    upright, raw = decode(io.BytesIO(content)), decode(io.BytesIO(content), upright=False)
    assert upright.size == (8, 24)
    assert raw.size == (24, 8)
    assert np.asarray(upright)[:8].min() > 240
    assert np.asarray(upright)[8:].max() < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone_as_viewers_do(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = encoded(Image.fromarray(noise(5, 7, 3)), exif=exif)
    assert np.array_equal(np.asarray(decode(image)), np.asarray(ImageOps.exif_transpose(Image.open(image))))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0" + b"II*\0\x08\0\0\0" + b"\xff\xff" + b"\x12\x01" * 40,  # 65535 entries, most beyond the end
        b"Exif\0\0" + b"II*\0\xff\xff\xff\x7f",  # starts beyond the end
        b"Exif\0\0" + b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x05\0\0\0\x01\0\0\0\0\0\0",  # not a number
        b"Exif\0\0" + b"no TIFF header at all",
        b"Exif\0\0",
    ],
)
def test_a_damaged_exif_block_rejects_no_image_and_says_nothing(exif, tmp_path):
    """Nothing: in a process of its own, since pytest replaces the filters of warnings."""
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    path = tmp_path / "damaged.jpg"
    path.write_bytes(JPEG[:2] + segment + JPEG[2:])
    for upright in (True, False):
        assert np.array_equal(np.asarray(decode(path, upright=upright)), np.asarray(decode(io.BytesIO(JPEG))))
    code = f"from ear.data.images import decode; [decode({str(path)!r}, upright=upright) for upright in (True, False)]"
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_is_read_by_its_path_too(tmp_path):
    pixels = noise(5, 7, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(decode(tmp_path / "a.png")), pixels)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image of format"),
        (b"hello, I am a text", "not an image of format"),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), "not an image of format"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:-2], "truncated"),
        (encoded(Image.new("1", (10_000, 10_000))).getvalue(), "decompression bomb"),
        (encoded(Image.new("1", (20_000, 20_000))).getvalue(), "decompression bomb"),
        (encoded(Image.new("L", (4, 4)), "TIFF").getvalue(), "not an image of format JPEG, PNG, WEBP, BMP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n", "not an image of format"),  # Ghostscript
    ],
)
def test_what_is_not_an_image_is_refused_with_the_reason(content, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        decode(io.BytesIO(content))
    assert "0x" not in str(caught.value)  # a memory address would differ from run to run


def test_pixels_survive_the_round_trip():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    signed = to_signed(pixels)
    assert signed.shape == (1, 3, 16, 16)
    assert signed.dtype == torch.float32
    assert (signed.min(), signed.max()) == (-1, 1)
    assert torch.equal(to_uint8(signed), torch.from_numpy(pixels))


def test_axes_are_moved_and_further_ones_kept():
    pixels = torch.from_numpy(noise(2, 5, 4, 6, 3))
    signed = to_signed(pixels)
    assert signed.shape == (2, 5, 3, 4, 6)
    assert signed[1, 2, 0, 3, 5] == pixels[1, 2, 3, 5, 0] / 127.5 - 1
    assert torch.equal(to_uint8(signed), pixels)


def test_values_are_rounded_and_clipped():
    values = torch.tensor([-2.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 0.999, 1.5]).view(1, 1, 5).expand(3, 1, 5)
    assert to_uint8(values)[0, :, 0].tolist() == [0, 0, 1, 255, 255]
    assert to_uint8(values.bfloat16())[0, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_picture_is_made_of_diverged_numbers(value):
    with pytest.raises(ValueError, match="infinite or NaN"):
        to_uint8(torch.full((3, 2, 2), value))


def test_grey_of_sixteen_bits_takes_little_memory():
    """16 million pixels in a PNG of a few kilobytes: 33 MB with 16 bits, 17 MB with 8, 50 MB as RGB."""
    content = encoded(Image.new("I;16", (4096, 4096), 1000)).getvalue()
    tracemalloc.start()
    decode(io.BytesIO(content))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 120e6
