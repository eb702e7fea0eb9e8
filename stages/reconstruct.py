"""Measure rFID, the FID between the held-out images and their reconstructions.

Reads data/reference, data/tokenizer and the held-out images of data/prepared. Writes data/reconstructions/metrics.json.
It does not depend on the model or on how it samples, so a changed guidance does not repeat it. A killed run resumes
from the images whose features are saved.
"""

from dataclasses import dataclass
from typing import Annotated

from ear import config
from ear.data.prepared import PreparedImages
from ear.evaluation import metrics
from ear.evaluation.extraction import extract
from ear.evaluation.extractors import open_extractor
from ear.evaluation.reference import Reference
from ear.files.json_files import read_json, rounded, write_json
from ear.lineage.run import Run
from ear.runtime import distributed
from ear.runtime.device import prepare_device
from ear.tokenizer.autoencoder import load_tokenizer
from ear.tokenizer.reconstruction import Reconstructions
from stages import program

EXTRACTOR, REFERENCE = "data/reference/extractor.safetensors", "data/reference/features.safetensors"
TOKENIZER, TOKENIZER_METRICS = "data/tokenizer/tokenizer.safetensors", "data/tokenizer/metrics.json"
PREPARED, TARGET = "data/prepared/index.json", "data/reconstructions/metrics.json"


@dataclass(frozen=True)
class Parameters:
    """What the stage depends on."""

    compute: config.Compute
    batch_size: Annotated[int, "reference.batch_size"]
    runtime: config.Runtime


def work(parameters: Parameters, run: Run) -> None:
    """Reconstruct, extract features, compare."""
    device = prepare_device(parameters.runtime.device, parameters.compute.threads)
    held_out, reference = PreparedImages("data/prepared", "val"), Reference.load(REFERENCE)
    extractor = open_extractor(EXTRACTOR, device)
    reference.check(
        "the held-out images",
        extractor_sha256=extractor.sha256,
        image_size=held_out.image_size,
        classes=list(held_out.classes),
    )
    scratch = run.scratch(program.plain(parameters), [EXTRACTOR, TOKENIZER, PREPARED])
    reconstructed = extract(
        Reconstructions(held_out, load_tokenizer(TOKENIZER), device),
        extractor=extractor,
        batch_size=parameters.batch_size,
        title="reconstructions",
        folder=scratch,
    )
    figures = distributed.on_main(reconstructed, lambda batches: metrics.reconstruction(batches, reference))
    if figures is None:  # not rank 0
        return
    figures = rounded(figures | {"psnr": read_json(TOKENIZER_METRICS)["psnr"]})
    write_json(run.output(TARGET), figures)
    print(f"rFID of {figures['images']} held-out images: {figures['rfid']:.3g}")


if __name__ == "__main__":
    program.run("reconstruct", work, Parameters, __doc__, unread=lambda _: program.TRAINING_IMAGES, many_processes=True)
