"""Extract features of the real images, by Inception or by a classifier trained on them.

Reads data/prepared. Writes data/reference: extractor.safetensors, features.safetensors (mean and covariance of all
training images, or those of reference.statistics; features of at most 10,000 training images) and metrics.json, with
the floor: FID and KID of the real held-out images. A killed run resumes from the classifier's last checkpoint, or from
the images whose features are saved, and ends in the same bytes (on CPUs).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ear import config
from ear.data.prepared import PreparedImages
from ear.evaluation import metrics, protocol
from ear.evaluation.classifier import CLASSIFIER, save_classifier, train_classifier
from ear.evaluation.extraction import Batch, LabelledImages, Selection, extract
from ear.evaluation.extractors import Extractor, open_extractor, save_inception
from ear.evaluation.reference import REFERENCE_ROWS, Reference, Summary, evenly, read_statistics, summarise
from ear.evaluation.statistics import Gaussian
from ear.files.atomic import link
from ear.files.json_files import rounded, write_json
from ear.lineage.run import Run
from ear.runtime import distributed
from ear.runtime.device import prepare_device
from stages import program


@dataclass(frozen=True)
class Parameters:
    """What the stage depends on."""

    compute: config.Compute
    reference: config.Reference
    runtime: config.Runtime


def work(parameters: Parameters, run: Run) -> None:
    """Make the extractor, extract features of the real images, measure the floor."""
    options = parameters.reference
    device = prepare_device(parameters.runtime.device, parameters.compute.threads)
    train, val = (PreparedImages("data/prepared", split) for split in ("train", "val"))
    scratch = run.scratch(program.plain(parameters), ["data/prepared/index.json"])
    file = scratch / "extractor.safetensors"
    distributed.from_main(lambda: make_extractor(file, train, options, scratch, device))
    extractor = open_extractor(file, device)
    identity, published, selected = identify(train, extractor, options)
    batches = partial(extract, extractor=extractor, batch_size=options.batch_size)
    real = summary(batches(selected, title="training images", folder=scratch / "train"), len(selected))
    held_out = summary(batches(val, title="held-out images", folder=scratch / "val"), len(val))
    if real is None or held_out is None:  # not rank 0
        return
    reference = Reference(published or real.gaussian, real.features, held_out.gaussian, identity)
    figures: dict[str, float] = {"train_images": len(train), "val_images": len(val)}
    if extractor.name == CLASSIFIER:
        figures |= {"train_accuracy": real.accuracy, "val_accuracy": held_out.accuracy}
    figures |= metrics.floor(reference, held_out, seed=options.seed)
    folder = run.output("data/reference")
    folder.mkdir()
    link(file, folder / file.name)
    reference.save(folder / "features.safetensors")
    write_json(folder / "metrics.json", rounded(figures))
    print("\n".join(protocol.readable(rounded(figures))))


def make_extractor(
    file: Path, train: PreparedImages, options: config.Reference, scratch: Path, device: torch.device
) -> None:
    """Write the classifier, after training it, or which Inception weights are used."""
    if options.extractor == "inception":
        save_inception(file, weights=options.weights)
    else:
        classifier = train_classifier(train, options, folder=scratch, device=device)
        save_classifier(file, classifier, classes=train.classes)


def identify(
    train: PreparedImages, extractor: Extractor, options: config.Reference
) -> tuple[dict, Gaussian | None, LabelledImages]:
    """(description of the reference, its published statistics if given, the training images to extract)."""
    identity: dict = {"name": "training images", "images": len(train), "statistics_sha256": ""}
    published: Gaussian | None = None
    selected: LabelledImages = train
    if options.statistics:  # which lack only the features of single images
        published, digest = read_statistics(options.statistics, dimension=extractor.dimension)
        identity = {"name": options.statistics, "images": None, "statistics_sha256": digest}
        selected = Selection(train, evenly(len(train), REFERENCE_ROWS))
    of_images = {"classes": list(train.classes), "image_size": train.image_size}
    return identity | of_images | {"extractor_sha256": extractor.sha256}, published, selected


def summary(batches: Iterator[Batch], images: int) -> Summary | None:
    """One pass over all images; None on ranks other than 0."""
    return distributed.on_main(batches, lambda batches: summarise(batches, images=images, rows=REFERENCE_ROWS))


if __name__ == "__main__":
    program.run("reference", work, Parameters, __doc__, many_processes=True)
