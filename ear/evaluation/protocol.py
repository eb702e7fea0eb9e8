"""The protocol of an evaluation: everything its metrics depend on, and reasons not to compare them with published ones.

A Frechet distance means nothing without the number of images, the reference and the extractor. Published ones for
ImageNet use 50,000 images, 50 of each of its 1,000 classes, and the statistics published with ADM (Dhariwal & Nichol,
2021), which are recognised here by their file names.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ear.evaluation.extractors import Extractor
from ear.evaluation.metrics import FRECHET_METHOD
from ear.evaluation.reference import Reference

PUBLISHED_IMAGES = 50_000  # generated images behind a published FID
PUBLISHED_CLASSES = 1_000  # of ImageNet
PUBLISHED_STATISTICS = {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}  # by image size
_PIXELS = "uint8, decoded in {}, never through a lossy file; real ones by ADM's centre crop"


def describe(
    sampling: dict,  # how the images were generated
    labels: Sequence[np.ndarray],  # labels of the images of each block
    *,
    extractor: Extractor,
    held_out_accuracy: float | None,  # of the classifier, if it is the extractor
    reference: Reference,
    reference_sha256: str,  # of the reference's file
    evaluation: dict,  # section evaluate of params.yaml
) -> dict:
    """Everything that the metrics depend on, as nested plain values."""
    real = reference.description
    per_class = [np.bincount(block, minlength=len(real["classes"])) for block in labels]
    return {
        "metric": fid_name(len(labels[0])),
        "images": len(labels[0]),
        "blocks": len(labels),
        "images_per_class": {"least": int(np.min(per_class)), "most": int(np.max(per_class))},
        "pixels": _PIXELS.format(sampling.get("decoder_precision", "float32")),  # earlier samples do not say it
        "sampling": {name: value for name, value in sampling.items() if name != "classes"},
        "extractor": {
            "name": extractor.name,
            "sha256": extractor.sha256,
            "features": extractor.dimension,
            "held_out_accuracy": held_out_accuracy,
        },
        "reference": {
            "name": real["name"],
            "images": real["images"],
            "sha256": real["statistics_sha256"] or reference_sha256,
            "rows": len(reference.features),
        },
        "fid_method": FRECHET_METHOD,
        "evaluation": evaluation,
    }


def fid_name(images: int) -> str:
    """The name of a Frechet distance by its number of generated images: FID-50k, FID-360."""
    thousands, rest = divmod(images, 1000)
    return f"FID-{images if rest else f'{thousands}k'}"


def incomparable(protocol: dict, *, extractor: Extractor, reference: Reference) -> list[str]:
    """Reasons (possibly none) why metrics under a protocol of `describe` cannot be compared with published ones."""
    real, per_class = reference.description, protocol["images_per_class"]
    size, classes = real["image_size"], len(real["classes"])
    published = PUBLISHED_STATISTICS.get(size)
    is_published = real["statistics_sha256"] and Path(real["name"]).name == published
    if published:
        reference_differs = f"figures rest on {real['name']}, published ones on {published} (reference.statistics)"
    else:
        reference_differs = f"no figures of images of {size} pixels are known to be published"
    reasons = {
        f"{protocol['images']} generated images, not {PUBLISHED_IMAGES}": protocol["images"] != PUBLISHED_IMAGES,
        f"{per_class['least']} to {per_class['most']} images per class": per_class["least"] != per_class["most"],
        f"{classes} classes, not ImageNet's {PUBLISHED_CLASSES}": classes != PUBLISHED_CLASSES,
        "another extractor than the published Inception weights": not extractor.published,
        reference_differs: not is_published,
    }
    return [reason for reason, holds in reasons.items() if holds]


def readable(figures: dict, indent: str = "") -> list[str]:
    """One line per entry of a nested dictionary; digests are shortened to 12 characters."""
    lines = []
    for name, value in figures.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *readable(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {value[:12] if name.endswith('sha256') and value else value}")
    return lines
