"""One image: file => upright RGB => centre crop => uint8 array <=> float tensor in [-1, 1].

No other file decodes images or scales pixels. Only the two tensor conversions import torch, so programs that just
decode start without it.
"""

import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ear.errors import UserError

if TYPE_CHECKING:
    import torch

# Damaged metadata does not affect pixels. The filter is global because `catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # others, such as EPS, would start programs outside this one
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class Encoding:
    """How the bytes of the images of one source are read."""

    upright: bool = True  # rotate image files as their EXIF entries say
    pixels: tuple[int, ...] = ()  # if the bytes are raw pixels, their shape, [H, W], [H, W, 1] or [H, W, 3]
    sha256: str = ""  # of all raw pixels of the source

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Encoding":
        """From what `dataclasses.asdict` and JSON made of it."""
        return cls(values["upright"], tuple(values["pixels"]), values["sha256"])

    def decode(self, content: bytes) -> Image.Image:
        """The bytes of one image => RGB image of 8 bits per channel; raises UserError as `decode` does."""
        if not self.pixels:
            return decode(io.BytesIO(content), upright=self.upright)
        array = np.frombuffer(content, np.uint8).reshape(self.pixels)
        return Image.fromarray(array[..., 0] if self.pixels[2:] == (1,) else array).convert("RGB")


def decode(file: str | Path | BinaryIO, *, upright: bool = True) -> Image.Image:
    """Image file => RGB image of 8 bits per channel.

    - Rotation: if `upright`, the EXIF orientation is applied, as image viewers do. The published ImageNet pipelines
      ignore it; use `upright=False` for those. A damaged EXIF block is ignored.
    - Grey, palette and CMYK become RGB by Pillow's conversion, without colour profiles, as in those pipelines.
    - Grey of 16 bits is divided by 257 and rounded, so 0..65535 maps to 0..255; Pillow itself would clip.
    - Transparent pixels are composed on white. Where a PNG names a transparent colour, Pillow compares it with 8-bit
      pixels, which can be wrong for 16-bit colour and for grey of 2 or 4 bits.
    - If there are several frames, the first is used.

    Raises UserError with the reason: not of a format in `FORMATS`, truncated or damaged, or more pixels than Pillow's
    limit against decompression bombs (PIL.Image.MAX_IMAGE_PIXELS). The caller adds the file's name.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):  # Pillow itself only warns
                raise Image.DecompressionBombError
            image.load()
            return _to_rgb(_upright(image) if upright else image)
    except UnidentifiedImageError as error:  # Pillow's own message contains a memory address
        raise UserError(f"not an image of format {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"possibly a decompression bomb, over {Image.MAX_IMAGE_PIXELS} pixels") from error
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes raise errors of many kinds: struct.error, SyntaxError, ...
        raise UserError(" ".join(str(error).split()) or type(error).__name__) from error


def _upright(image: Image.Image) -> Image.Image:
    """The image rotated as its EXIF orientation says; unchanged if the EXIF block is damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # damaged bytes raise errors of many kinds
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        image = _eight_bit(image, image.info.get("transparency"))
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _eight_bit(image: Image.Image, transparent: int | None) -> Image.Image:
    """Grey 0..65535 => 0..255, rounded; row by row, so that no wider copy of the whole image is needed.

    transparent: the value of transparent pixels, if there are any; the result then has an alpha channel.
    """
    values = np.asarray(image)
    eight = np.empty(values.shape, np.uint8)
    for row, target in zip(values, eight, strict=True):
        target[:] = (row.astype(np.uint32) + 128) // 257
    grey = Image.fromarray(eight)
    if transparent is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == transparent, np.uint8(0), np.uint8(255)))))


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """RGB image => uint8 [size, size, 3], by ADM's centre crop, which published FIDs use.

    Both sides are halved with a box filter while the short side is at least twice `size`; a bicubic filter brings the
    short side to `size`; the centre is cut out. Smaller images are enlarged. Raises UserError if the image is so
    elongated that resizing it would exceed Pillow's pixel limit.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise UserError(f"too long and thin: {image.width} x {image.height} pixels for a square of {size}")
    bicubic = Image.Resampling.BICUBIC
    if width > size:  # Pillow filters horizontally first, so columns that are cut off can be dropped early
        left = (width - size) // 2
        rows = image.resize((width, image.height), bicubic).crop((left, 0, left + size, image.height))
        return np.array(rows.resize((size, size), bicubic))
    top = (height - size) // 2
    return np.array(image.resize((size, height), bicubic).crop((0, top, size, top + size)))


def to_signed(images: "np.ndarray | torch.Tensor") -> "torch.Tensor":
    """uint8 [..., H, W, 3] => float32 tensor [..., 3, H, W] in [-1, 1], on the device of `images`."""
    import torch

    images = torch.as_tensor(images)
    assert images.dtype == torch.uint8, f"pixels are {images.dtype}, not uint8"
    return images.movedim(-1, -3).contiguous().float() / 127.5 - 1


def to_uint8(images: "torch.Tensor") -> "torch.Tensor":
    """Float tensor [..., 3, H, W] => uint8 tensor [..., H, W, 3]: [-1, 1] to 0..255, rounded and clipped.

    The inverse of `to_signed`. Raises UserError if a pixel is infinite or NaN.
    """
    import torch

    if not images.isfinite().all():
        raise UserError("an image has infinite or NaN pixels; check whether training or decoding diverged.")
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).movedim(-3, -1).contiguous()
