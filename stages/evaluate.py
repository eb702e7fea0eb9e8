"""Compute FID, Inception score, KID, precision and recall of the generated images, and the protocol behind them.

Reads data/reference, data/samples/samples.h5 and data/reconstructions (rFID: what the tokenizer alone loses).
Writes data/evaluation: metrics.json, and protocol.json with everything that the metrics depend on. If the extractor is
a classifier, the metrics include class accuracy: the share of images that it assigns to the class that they were
conditioned on.
A killed run resumes from the images whose features are saved.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from ear import config
from ear.evaluation import metrics, protocol
from ear.evaluation.extraction import Batch, extract, gather
from ear.evaluation.extractors import open_extractor
from ear.evaluation.reference import Reference
from ear.evaluation.statistics import class_accuracy
from ear.files.digests import sha256
from ear.files.json_files import read_json, rounded, write_json
from ear.lineage.run import Run
from ear.runtime import distributed
from ear.runtime.device import prepare_device
from ear.sampling.samples import GeneratedImages
from stages import program

EXTRACTOR, REFERENCE = "data/reference/extractor.safetensors", "data/reference/features.safetensors"
REAL, RECONSTRUCTIONS = "data/reference/metrics.json", "data/reconstructions/metrics.json"
SAMPLES = "data/samples/samples.h5"
TARGET, PROTOCOL = "data/evaluation/metrics.json", "data/evaluation/protocol.json"


@dataclass(frozen=True)
class Parameters:
    """What the stage depends on."""

    compute: config.Compute
    evaluate: config.Evaluate
    batch_size: Annotated[int, "reference.batch_size"]
    runtime: config.Runtime


def work(parameters: Parameters, run: Run) -> None:
    """Extract features, compare, report."""
    options = parameters.evaluate
    device = prepare_device(parameters.runtime.device, parameters.compute.threads)
    generated, real = GeneratedImages(SAMPLES), read_json(REAL)
    blocks = generated.blocks(options.repeats)
    reference, extractor = Reference.load(REFERENCE), open_extractor(EXTRACTOR, device)
    reference.check(
        "the generated images",
        extractor_sha256=extractor.sha256,
        image_size=generated.image_size,
        classes=generated.sampling["classes"],
    )
    metrics.check_counts(options, generated=len(blocks[0]), real=len(reference.features))

    scratch = run.scratch(program.plain(parameters), [EXTRACTOR, SAMPLES])
    batches = partial(extract, extractor=extractor, batch_size=parameters.batch_size)
    score = partial(block_metrics, reference=reference, options=options, real=real)
    scored = [
        distributed.on_main(
            batches(block, title="samples", folder=scratch / f"samples-{number}"), partial(score, images=len(block))
        )
        for number, block in enumerate(blocks)
    ]
    if not distributed.is_main():
        return
    figures = metrics.across([block for block in scored if block is not None])
    equal, floor = figures.get("fid_equal"), real["fid"]
    figures |= {"fid_floor": floor, "fid_equal_images": real["val_images"]}
    figures["fid_ratio"] = equal / floor if equal is not None and floor > 0 else None
    figures["nearest_ratio"] = figures["nearest"] / real["nearest"] if real["nearest"] > 0 else None
    figures["reconstruction"] = read_json(RECONSTRUCTIONS)
    described = protocol.describe(
        generated.sampling,
        [block.labels for block in blocks],
        extractor=extractor,
        held_out_accuracy=real.get("val_accuracy"),
        reference=reference,
        reference_sha256=sha256(REFERENCE),
        evaluation=options.model_dump(exclude={"repeats"}),
    )
    why = protocol.incomparable(described, extractor=extractor, reference=reference)
    write_json(run.output(TARGET), rounded(figures))
    write_json(run.output(PROTOCOL), rounded({"comparable_with_published": not why, "why": why, **described}))
    print("\n".join(protocol.readable(rounded(figures | {"protocol": described}))))
    if why:
        print(f"Do not compare with published figures: {'; '.join(why)}.")


def block_metrics(
    batches: Iterator[Batch], images: int, reference: Reference, options: config.Evaluate, real: dict
) -> dict[str, float]:
    """All metrics of a block of generated images, with class accuracy if the extractor is a classifier.

    real: what the reference stage measured on real images.
    """
    generated = gather(batches, images)
    figures = metrics.compare(generated.features, generated.logits, reference, options, real["val_images"])
    if "val_accuracy" in real:
        figures["class_accuracy"] = class_accuracy(generated.logits, generated.labels)
    return figures


if __name__ == "__main__":
    program.run("evaluate", work, Parameters, __doc__, many_processes=True)
