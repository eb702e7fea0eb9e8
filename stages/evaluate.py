"""FID, Inception score, KID, precision and recall of the generated images, with the protocol behind them.

Reads data/reference, data/samples/samples.h5 and, for the distance that the tokenizer alone causes, data/tokenizer and
the held-out images of data/prepared; writes data/evaluation/metrics.json. Where a classifier is the extractor, the
share of images that it takes for their class is a figure too. A killed run goes on from the images whose features are
known.
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

from ear import device as devices
from ear import distributed, features, metrics, protocol, records
from ear.autoencoder import load_tokenizer
from ear.prepared import PreparedImages
from ear.reconstruction import Reconstructions
from ear.samples import GeneratedImages
from stages import program

EXTRACTOR, REFERENCE = "data/reference/extractor.safetensors", "data/reference/features.safetensors"
TOKENIZER, TOKENIZER_FIGURES = "data/tokenizer/tokenizer.safetensors", "data/tokenizer/metrics.json"
PREPARED = "data/prepared/index.json"
REAL, SAMPLES, TARGET = "data/reference/metrics.json", "data/samples/samples.h5", "data/evaluation/metrics.json"


def work(parameters) -> None:
    """Extract, compare, report."""
    options, size = asdict(parameters.evaluate), parameters.reference.batch_size
    device = devices.prepare(parameters.runtime.device, parameters.compute.threads)
    made, real = GeneratedImages(SAMPLES), records.read_json(REAL)
    blocks = made.blocks(options.pop("repeats"))
    reference, extractor = metrics.Reference.load(REFERENCE), features.open_extractor(EXTRACTOR, device)
    reference.check(extractor_sha256=extractor.sha256, image_size=made.image_size, classes=made.sampling["classes"])
    counts = {key: options[key] for key in ("kid_subset_size", "neighborhood")}
    metrics.check_counts(generated=len(blocks[0]), real=len(reference.features), **counts)

    scratch = program.scratch("evaluate", parameters, [EXTRACTOR, SAMPLES, TOKENIZER, PREPARED])
    look = partial(features.stream, extractor=extractor, batch_size=size)
    score = partial(figures_of, reference=reference, options=options, labelled=extractor.name == features.CLASSIFIER)
    blocks_figures = [
        distributed.on_main(
            look(block, title="samples", folder=scratch / f"samples-{number}"), partial(score, images=len(block))
        )
        for number, block in enumerate(blocks)
    ]
    decoded = Reconstructions(PreparedImages("data/prepared", "val"), load_tokenizer(TOKENIZER), device)
    batches = look(decoded, title="reconstructions", folder=scratch / "reconstructions")
    distances = distributed.on_main(batches, lambda batches: metrics.reconstruction(batches, reference))
    if not distributed.is_main():
        return
    figures = metrics.across(blocks_figures)
    figures |= {"fid_floor": real["fid"], "fid_ratio": figures["fid"] / real["fid"] if real["fid"] > 0 else None}
    figures["reconstruction"] = distances | {"psnr": records.read_json(TOKENIZER_FIGURES)["psnr"]}
    described = protocol.describe(
        made.sampling,
        [block.labels for block in blocks],
        extractor=extractor,
        held_out_accuracy=real.get("val_accuracy"),
        reference=reference,
        reference_sha256=records.sha256(REFERENCE),
        evaluation=options,
    )
    why = protocol.incomparable(described, extractor=extractor, reference=reference)
    verdict = {"comparable_with_published": not why, "why": why, "protocol": described}
    records.write_json(TARGET, records.rounded(figures | verdict))
    print("\n".join(protocol.readable(records.rounded(figures | {"protocol": described}))))
    if why:
        print(f"Do not compare with published figures: {'; '.join(why)}.")


def figures_of(
    batches: Iterator[features.Batch], images: int, reference: metrics.Reference, options: dict, labelled: bool
) -> dict[str, float]:
    """All figures of generated images; the class accuracy among them where logits are of the labels' classes."""
    generated = features.gather(batches, images)
    figures = metrics.compare(generated.features, generated.logits, reference, **options)
    if labelled:
        figures["class_accuracy"] = metrics.class_accuracy(generated.logits, generated.labels)
    return figures


if __name__ == "__main__":
    program.run("evaluate", work, __doc__, many_processes=True)
