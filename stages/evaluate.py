"""FID, Inception score, KID, precision and recall of the generated images, with the protocol behind them.

Reads data/reference, data/samples/samples.h5 and, for the distance that the tokenizer alone causes, data/tokenizer and
the held-out images of data/prepared; writes data/evaluation/metrics.json. Where a classifier is the extractor, the
share of images that it takes for their class is a figure too.
"""

from dataclasses import asdict

from ear import device as devices
from ear import distributed, features, metrics, protocol, records
from ear.autoencoder import load_tokenizer
from ear.prepared import PreparedImages
from ear.reconstruction import Reconstructions
from ear.samples import Block, GeneratedImages
from stages import program

EXTRACTOR, REFERENCE = "data/reference/extractor.safetensors", "data/reference/features.safetensors"
TOKENIZER, TOKENIZER_FIGURES = "data/tokenizer/tokenizer.safetensors", "data/tokenizer/metrics.json"
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

    blocks_figures = [score(block, extractor, reference, options, size) for block in blocks]
    distances = reconstruct(extractor, reference, device, size)
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


def score(block: Block, extractor: features.Extractor, reference: metrics.Reference, options: dict, batch_size: int):
    """All figures of one block; None beside the main process."""
    batches = features.stream(block, extractor, batch_size=batch_size, title="samples")
    generated = distributed.on_main(batches, lambda batches: features.gather(batches, len(block)))
    if generated is None:
        return None
    figures = metrics.compare(generated.features, generated.logits, reference, **options)
    if extractor.name == features.CLASSIFIER:
        figures["class_accuracy"] = metrics.class_accuracy(generated.logits, generated.labels)
    return figures


def reconstruct(extractor: features.Extractor, reference: metrics.Reference, device, batch_size: int) -> dict | None:
    """What the tokenizer costs: the distances of reconstructed held-out images to these and to the reference."""
    source = Reconstructions(PreparedImages("data/prepared", "val"), load_tokenizer(TOKENIZER), device)
    batches = features.stream(source, extractor, batch_size=batch_size, title="reconstructions")
    return distributed.on_main(batches, lambda batches: metrics.reconstruction(batches, reference))


if __name__ == "__main__":
    program.run("evaluate", work, __doc__, many_processes=True)
