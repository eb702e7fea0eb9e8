"""FID, Inception score, KID, precision and recall of the generated images, with the protocol behind them.

Reads data/reference and data/samples/samples.h5; writes data/evaluation/metrics.json. Where a classifier is the
extractor, the share of images that it takes for their class is a figure too.
"""

from dataclasses import asdict

import numpy as np

from ear import device as devices
from ear import features, metrics, records
from stages import program

EXTRACTOR, REFERENCE = "data/reference/extractor.safetensors", "data/reference/features.safetensors"
REAL, SAMPLES, TARGET = "data/reference/metrics.json", "data/samples/samples.h5", "data/evaluation/metrics.json"


def work(parameters) -> None:
    """Extract, compare, report."""
    options = parameters.evaluate
    device = devices.prepare(parameters.runtime.device, parameters.compute.threads)
    samples, real = features.GeneratedImages(SAMPLES), records.read_json(REAL)
    reference, extractor = metrics.Reference.load(REFERENCE), features.open_extractor(EXTRACTOR, device)
    reference.check(
        extractor_sha256=extractor.sha256,
        image_size=samples.image_size,
        classes=samples.sampling["classes"],
    )
    metrics.check_counts(
        generated=len(samples),
        real=len(reference.features),
        kid_subset_size=options.kid_subset_size,
        neighborhood=options.neighborhood,
    )
    generated = features.extract(samples, extractor, batch_size=parameters.reference.batch_size, title="samples")
    figures = metrics.compare(generated.features, generated.logits, reference, **asdict(options))
    figures |= {"fid_floor": real["fid"], "fid_ratio": figures["fid"] / real["fid"] if real["fid"] > 0 else None}
    if extractor.name == features.CLASSIFIER:
        figures["class_accuracy"] = metrics.class_accuracy(generated.logits, generated.labels)
    why = metrics.incomparable(
        images=len(samples),
        published_extractor=extractor.published,
        published_reference=bool(reference.description["statistics_sha256"]),
    )
    protocol = describe(samples, reference, extractor, real) | {"evaluation": asdict(options)}
    report = figures | {"comparable_with_published": not why, "why": why, "protocol": protocol}
    records.write_json(TARGET, records.rounded(report))
    print("\n".join(metrics.readable(records.rounded(figures | {"protocol": protocol}))))
    if why:
        print(f"Do not compare with published figures: {'; '.join(why)}.")


def describe(
    samples: features.GeneratedImages, reference: metrics.Reference, extractor: features.Extractor, real: dict
) -> dict:
    """The protocol: what the figures depend on."""
    made = reference.description
    per_class = np.bincount(samples.labels, minlength=len(made["classes"]))
    return {
        "images": len(samples),
        "images_per_class": {"least": int(per_class.min()), "most": int(per_class.max())},
        "sampling": {name: value for name, value in samples.sampling.items() if name != "classes"},
        "extractor": {
            "name": extractor.name,
            "sha256": extractor.sha256,
            "features": extractor.dimension,
            "held_out_accuracy": real.get("val_accuracy"),
        },
        "reference": {
            "name": made["name"],
            "images": made["images"],
            "sha256": made["statistics_sha256"] or records.sha256(REFERENCE),
            "rows": len(reference.features),
        },
        "fid_method": metrics.FRECHET_METHOD,
    }


if __name__ == "__main__":
    program.run("evaluate", work, __doc__)
