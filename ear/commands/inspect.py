"""What a folder of images holds: layout, classes, sizes, unreadable files, fitting preset (`ear inspect PATH`).

Lists the images as the fetch stage does, writes nothing, and decodes a few random ones. Pixels of arrays are not read.
"""

import shlex
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ear.config.compose import quoted
from ear.data import sources
from ear.data.images import Encoding
from ear.data.manifest import Contents
from ear.data.sources import Source, imagenet
from ear.errors import UserError

_VAL_FRACTION = 0.1  # held out in what is shown, if the source has no validation images
_SHOWN = 3  # classes and unreadable images to name
_SIDES = {"digits": 16, "fashion": 40}  # preset => largest short side that it suits, in pixels; else folder64
_DOWNSAMPLE = {"digits": 2, "fashion": 4}  # of their tokenizers; must divide the size
_BROUGHT = " tokenizer.weights=KL16_CHECKPOINT reference.statistics=ADM_STATISTICS"  # files that ImageNet presets need
_IMAGENET = ("imagenet256_base", "imagenet256_large", "imagenet256_huge")
_LARGE = ("folder64", "folder64_cpu")  # on a GPU, on a CPU


@dataclass(frozen=True)
class Sampled:
    """Findings from a random sample of the images."""

    bytes: list[int]  # of every encoded image
    short_sides: list[int]  # of every readable image, in pixels
    unreadable: list[tuple[str, str]]  # path, reason


def sample(source: Source, count: int, seed: int) -> Sampled:
    """Decode at most `count` images, selected by `seed`; those of arrays all have the shape in the header."""
    if source.arrays:
        return Sampled([], [min(source.arrays[0].shape[1:3])], [])
    count = min(count, len(source.images))
    chosen = np.random.default_rng(seed).choice(len(source.images), count, replace=False)
    sizes, short_sides, unreadable = [], [], []
    with Contents(source.root) as contents:
        for image in (source.images[k] for k in sorted(chosen)):
            try:
                content = contents.read(image)
                sizes.append(len(content))
                short_sides.append(min(Encoding().decode(content).size))
            except (UserError, OSError) as error:
                unreadable.append((image.path, getattr(error, "strerror", None) or str(error)))
    return Sampled(sizes, short_sides, unreadable)


def fitting(source: Source, sampled: Sampled) -> tuple[str, ...]:
    """The presets for such images, the smallest first."""
    if sources.is_imagenet(source):
        return _IMAGENET
    side = _side(sampled)
    small = next((preset for preset, largest in _SIDES.items() if side and side <= largest), None)
    return (small,) if small else _LARGE


def _side(sampled: Sampled) -> int:
    """The median short side; 0 if no image could be read."""
    return statistics.median_low(sampled.short_sides) if sampled.short_sides else 0


def _command(path: str, source: Source, sampled: Sampled, presets: tuple[str, ...]) -> str:
    """How to configure the first of the fitting presets for these images."""
    preset = presets[0]
    words = ["ear", "configure", f"preset={preset}"]
    if presets != _IMAGENET:
        words.append(f"data.source={source.kind}")
    if preset in _SIDES:  # presets of one data set: its size and its names are not these images'
        size = max(_side(sampled) // _DOWNSAMPLE[preset] * _DOWNSAMPLE[preset], 4)
        words += [f"data.image_size={size}", "data.class_names=[]"]
    words.append(f"data.path={quoted(path)}")
    return shlex.join(words) + (_BROUGHT if presets == _IMAGENET else "")


def describe(path: str, source: Source, sampled: Sampled) -> str:
    """The findings as text."""
    counts = Counter(image.split for image in source.images)
    whole = imagenet.are_wnids(source.classes)  # compare the counts with ImageNet's
    held_out = "" if source.has_val else f", held out of the training images if data.val_fraction is {_VAL_FRACTION}"
    lines = [
        ("classes", _of(len(source.classes), imagenet.CLASSES, whole) + f": {_classes(source)}"),
        ("training", _of(counts["train"], imagenet.TRAIN_IMAGES, whole) + " images"),
        ("validation", _of(counts["val"], imagenet.VAL_IMAGES, whole) + f" images{held_out}"),
        ("size", _size(source, sampled)),
        ("pixels", _shape(source)) if source.arrays else ("sample", _sample(sampled)),
        *(("", f"{image}: {reason}") for image, reason in sampled.unreadable[:_SHOWN]),
    ]
    presets = fitting(source, sampled)
    lines += [("preset", ", ".join(presets)), ("next", _command(path, source, sampled, presets))]
    return "\n".join([f"{path}: {source.layout}", *(f"  {title:<11} {text}" for title, text in lines)])


def _of(count: int, whole: int, compare: bool) -> str:
    return f"{count:,} of {whole:,}" if compare else f"{count:,}"


def _classes(source: Source) -> str:
    shown = [f"{name} ({source.names[name]})" if name in source.names else name for name in source.classes[:_SHOWN]]
    return ", ".join(shown + (["..."] if len(source.classes) > _SHOWN else []))


def _size(source: Source, sampled: Sampled) -> str:
    """Total size: exact for archives, estimated from the sample for trees (asking for every file would take long)."""
    sizes = [image.bytes for image in source.images if image.bytes is not None]
    if len(sizes) == len(source.images):
        return _bytes(sum(sizes))
    if not sampled.bytes:
        return "unknown"
    return f"about {_bytes(statistics.mean(sampled.bytes) * len(source.images))}, judging by the sample"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.3f} MB"


def _shape(source: Source) -> str:
    height, width, *channels = source.arrays[0].shape[1:]
    return f"{height} x {width}, {'colour' if channels == [3] else 'grey'}"


def _sample(sampled: Sampled) -> str:
    text = f"{len(sampled.short_sides) + len(sampled.unreadable)} images, {len(sampled.unreadable)} unreadable"
    if not sampled.short_sides:
        return text
    sides = sampled.short_sides
    return f"{text}; short side {min(sides)} to {max(sides)} pixels, median {statistics.median_low(sides)}"


def run(path: str, *, samples: int, seed: int) -> str:
    """The findings about a path as text, from at most `samples` decoded images; raises UserError, OSError."""
    source = sources.find(Path(path), val_fraction=_VAL_FRACTION)
    return describe(path, source, sample(source, samples, seed))
