"""Features of the real images, from Inception or from a classifier trained on them.

Reads data/prepared; writes data/reference: extractor.safetensors, features.safetensors (mean and covariance over all
training images, features of some) and metrics.json, with the distances between real images and real images: the floor
under what generated ones can reach. A killed training of the classifier goes on from its last checkpoint.
"""

from itertools import count
from pathlib import Path

import torch

from ear import device as devices
from ear import features, metrics, protocol, randomness, records
from ear.images import to_signed
from ear.optimizer import Group, adamw, schedule
from ear.prepared import PreparedImages
from ear.training import Trainer
from stages import program


def work(parameters) -> None:
    """The extractor, the real images in its features, the floor."""
    options = parameters.reference
    device = devices.prepare(parameters.runtime.device, parameters.compute.threads)
    train, val = (PreparedImages("data/prepared", split) for split in ("train", "val"))
    with records.whole_folder("data/reference") as folder:
        file = folder / "extractor.safetensors"
        if options.extractor == "classifier":
            scratch = program.scratch("reference", parameters, sorted(Path("data/prepared").glob("*.h5")))
            classifier = train_classifier(train, options, scratch, device)
            features.save_classifier(file, classifier, classes=train.classes)
        else:
            features.save_inception(file, weights=options.weights)
        extractor = features.open_extractor(file, device)
        reference, figures = describe(train, val, extractor, options)
        reference.save(folder / "features.safetensors")
        records.write_json(folder / "metrics.json", records.rounded(figures))
    print("\n".join(protocol.readable(records.rounded(figures))))


def train_classifier(train: PreparedImages, options, folder: Path, device: torch.device) -> features.Classifier:
    """The averaged weights of a classifier trained on randomly shifted training images."""
    size, seed = options.batch_size, randomness.derive(options.seed, "classifier")
    order = randomness.DataOrder(len(train), seed)
    classifier = features.Classifier(len(train.classes), train.image_size)
    classifier.initialise(randomness.generator(seed, "weights")).to(device)

    def batches(start: int):
        for position in count(start, size):
            rows = order.indices(position, size).numpy()
            yield to_signed(train.images(rows)), torch.from_numpy(train.labels[rows])

    def loss(batch, position: int):
        generator = randomness.generator(seed, "shift", position)
        return classifier.loss(batch[0].to(device), batch[1].to(device), generator), {}

    group = Group(list(classifier.parameters()), weight_decay=0.05)
    trainer = Trainer(
        classifier,
        optimizer=adamw([group], learning_rate=options.learning_rate, beta1=0.9, beta2=0.99),
        loss=loss,
        rate=schedule("cosine", total_images=options.images, warmup_images=0),
        ema_decay=0.99,
        clip_norm=1.0,
        global_batch_size=size,
        micro_batch_size=size,
    )
    tenth = max(options.images // 10, size)
    trainer.fit(batches, total_images=options.images, folder=folder, checkpoint_images=tenth, title="classifier")
    return trainer.average.module


def describe(train: PreparedImages, val: PreparedImages, extractor: features.Extractor, options):
    """(reference, figures), from one pass over the training and one over the held-out images."""
    identity = {"name": "training images", "images": len(train), "statistics_sha256": ""}
    published, seen = None, train
    if options.statistics:  # read before the long work, which is then short: only single features are needed
        published, digest = metrics.read_statistics(options.statistics, dimension=extractor.dimension)
        identity = {"name": options.statistics, "images": None, "statistics_sha256": digest}
        seen = features.Selection(train, metrics.evenly(len(train), metrics.REFERENCE_ROWS))
    real, held_out = (
        metrics.summarise(
            features.stream(images, extractor, batch_size=options.batch_size, title=f"{title} images"),
            images=len(images),
            rows=metrics.REFERENCE_ROWS,
        )
        for title, images in {"training": seen, "held-out": val}.items()
    )
    identity |= {"classes": list(train.classes), "image_size": train.image_size, "extractor_sha256": extractor.sha256}
    reference = metrics.Reference(published or real.gaussian, real.features, held_out.gaussian, identity)
    figures = {"train_images": len(train), "val_images": len(val)}
    if extractor.name == features.CLASSIFIER:
        figures |= {"train_accuracy": real.accuracy, "val_accuracy": held_out.accuracy}
    return reference, figures | metrics.floor(reference, held_out, seed=options.seed)


if __name__ == "__main__":
    program.run("reference", work, __doc__)
