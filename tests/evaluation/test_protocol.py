"""What is said about how figures were measured."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ear.evaluation import protocol
from ear.evaluation.extractors import INCEPTION, Extractor
from ear.evaluation.reference import Reference
from ear.evaluation.statistics import Gaussian

CLASSES = [str(k) for k in range(1000)]
SAMPLING = {"steps": 64, "guidance": 3.0, "decoder_precision": "bfloat16", "seed": 0, "classes": CLASSES}

ADM = "VIRTUAL_imagenet256_labeled.npz"


def reference(
    name: str = f"weights/{ADM}", statistics_sha256: str = "5" * 64, image_size: int = 256, classes: int = 1000
) -> Reference:
    gaussian = Gaussian(torch.zeros(3).double(), torch.eye(3).double())
    source = {"name": name, "images": None, "statistics_sha256": statistics_sha256}
    description = source | {"image_size": image_size, "classes": CLASSES[:classes]}
    return Reference(gaussian, torch.zeros(7, 3), gaussian, description)


def described(count: int = 50_000, *, blocks: int = 1, extractor_sha256: str = "6726825d" + "0" * 56, **changes):
    """(protocol, reasons against comparing) of balanced labels and the published extractor and statistics."""
    real = reference(**changes)
    extractor = Extractor(
        SimpleNamespace(), INCEPTION, extractor_sha256, ("2048", "logits_unbiased"), torch.device("cpu")
    )
    how = protocol.describe(
        SAMPLING,
        [np.arange(count) % len(real.description["classes"])] * blocks,
        extractor=extractor,
        held_out_accuracy=None,
        reference=real,
        reference_sha256="7" * 64,
        evaluation={"seed": 2020},
    )
    return how, protocol.incomparable(how, extractor=extractor, reference=real)


def test_the_published_protocol_is_comparable():
    how, why = described(blocks=3)
    assert why == []
    assert how["metric"] == "FID-50k"
    assert (how["images"], how["blocks"]) == (50_000, 3)
    assert how["images_per_class"] == {"least": 50, "most": 50}
    assert how["sampling"] == {"steps": 64, "guidance": 3.0, "decoder_precision": "bfloat16", "seed": 0}
    assert how["pixels"].startswith("uint8, decoded in bfloat16, never through a lossy file")
    assert how["extractor"]["features"] == 2048
    assert how["reference"] == {"name": f"weights/{ADM}", "images": None, "sha256": "5" * 64, "rows": 7}
    assert how["evaluation"] == {"seed": 2020}


def test_images_of_512_pixels_have_published_statistics_of_their_own():
    _, why = described(name="VIRTUAL_imagenet512.npz", image_size=512)
    assert why == []


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"count": 10_000}, ["10000 generated images, not 50000"]),
        ({"count": 100_000}, ["100000 generated images, not 50000"]),
        ({"count": 50_010}, ["50010 generated images, not 50000", "50 to 51 images per class"]),
        ({"extractor_sha256": "0" * 64}, ["another extractor than the published Inception weights"]),
        ({"classes": 10}, ["10 classes, not ImageNet's 1000"]),
        (
            {"name": "/data/own.npz"},
            [
                f"figures rest on /data/own.npz, published ones on {ADM} (reference.statistics)",
            ],
        ),
        (
            {"image_size": 512},
            [f"figures rest on weights/{ADM}, published ones on VIRTUAL_imagenet512.npz "],
        ),
        ({"image_size": 64}, ["no figures of images of 64 pixels are known to be published"]),
        ({"name": "training images", "statistics_sha256": ""}, ["figures rest on training images, published ones on"]),
        ({"name": ADM, "statistics_sha256": ""}, [f"figures rest on {ADM}, published"]),
        (
            {"count": 10, "name": "training images", "statistics_sha256": ""},
            ["10 generated", "0 to 1 images per class", "figures rest on training images"],
        ),
    ],
)
def test_what_forbids_comparing_is_named(changes, reasons):
    _, why = described(**changes)
    assert len(why) == len(reasons)
    assert all(found.startswith(reason) for found, reason in zip(why, reasons, strict=True))


def test_own_statistics_are_named_by_their_file():
    how, _ = described(statistics_sha256="")
    assert how["reference"]["sha256"] == "7" * 64


def test_distances_say_how_many_images_they_stand_on():
    assert [protocol.fid_name(n) for n in (50_000, 1000, 360, 1500)] == ["FID-50k", "FID-1k", "FID-360", "FID-1500"]


def test_figures_are_readable():
    figures = {"fid": 1.23456789, "n": 3, "deep": {"sha256": "0123456789abcdef", "list": [0.1234567]}}
    assert protocol.readable(figures) == [
        "fid: 1.23456789",
        "n: 3",
        "deep:",
        "  sha256: 0123456789ab",
        "  list: [0.1234567]",
    ]
