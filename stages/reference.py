"""Features of the real images, from Inception or from a classifier trained on them.

Reads data/prepared; writes data/reference: extractor.safetensors, features.safetensors (mean and covariance over all
training images, features of some) and metrics.json, with the distances between real images and real images: the floor
under what generated ones can reach. A killed run goes on from the classifier's last checkpoint, or from the images
whose features are known, and ends in the same bytes.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from ear import device as devices
from ear import distributed, features, metrics, protocol, records
from ear.classifier_training import train_classifier
from ear.prepared import PreparedImages
from stages import program


def work(parameters) -> None:
    """The extractor, the real images in its features, the floor."""
    options = parameters.reference
    device = devices.prepare(parameters.runtime.device, parameters.compute.threads)
    train, val = (PreparedImages("data/prepared", split) for split in ("train", "val"))
    scratch = program.scratch("reference", parameters, ["data/prepared/index.json"])
    file = scratch / "extractor.safetensors"
    distributed.from_main(lambda: make_extractor(file, train, options, scratch, device))
    extractor = features.open_extractor(file, device)
    identity, published, seen = identify(train, extractor, options)
    look = partial(features.stream, extractor=extractor, batch_size=options.batch_size)
    real = summarise(look(seen, title="training images", folder=scratch / "train"), len(seen))
    held_out = summarise(look(val, title="held-out images", folder=scratch / "val"), len(val))
    if not distributed.is_main():
        return
    reference = metrics.Reference(published or real.gaussian, real.features, held_out.gaussian, identity)
    figures = {"train_images": len(train), "val_images": len(val)}
    if extractor.name == features.CLASSIFIER:
        figures |= {"train_accuracy": real.accuracy, "val_accuracy": held_out.accuracy}
    figures |= metrics.floor(reference, held_out, seed=options.seed)
    with records.whole_folder("data/reference") as folder:
        records.link(file, folder / file.name)
        reference.save(folder / "features.safetensors")
        records.write_json(folder / "metrics.json", records.rounded(figures))
    print("\n".join(protocol.readable(records.rounded(figures))))


def make_extractor(file: Path, train: PreparedImages, options, scratch: Path, device: torch.device) -> None:
    """Write the classifier, trained here, or which Inception weights are to be used."""
    if options.extractor == "inception":
        features.save_inception(file, weights=options.weights)
        return
    classifier = train_classifier(
        train,
        total_images=options.images,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        folder=scratch,
        device=device,
    )
    features.save_classifier(file, classifier, classes=train.classes)


def identify(train: PreparedImages, extractor: features.Extractor, options):
    """(description of the reference, its published statistics if they were given, the training images to look at)."""
    identity = {"name": "training images", "images": len(train), "statistics_sha256": ""}
    published, seen = None, train
    if options.statistics:  # what is missing beside them is the features of some images
        published, digest = metrics.read_statistics(options.statistics, dimension=extractor.dimension)
        identity = {"name": options.statistics, "images": None, "statistics_sha256": digest}
        seen = features.Selection(train, metrics.evenly(len(train), metrics.REFERENCE_ROWS))
    of_images = {"classes": list(train.classes), "image_size": train.image_size}
    return identity | of_images | {"extractor_sha256": extractor.sha256}, published, seen


def summarise(batches: Iterator[features.Batch], images: int) -> metrics.Summary | None:
    """One pass over the images; None beside the main process."""
    return distributed.on_main(
        batches, lambda batches: metrics.summarise(batches, images=images, rows=metrics.REFERENCE_ROWS)
    )


if __name__ == "__main__":
    program.run("reference", work, __doc__, many_processes=True)
