"""Training of the classifier whose features stand in for Inception's on a small data set."""

from collections.abc import Iterator
from pathlib import Path

import torch

from ear import randomness
from ear.features import Classifier
from ear.images import to_signed
from ear.optimizer import Group, adamw, schedule
from ear.prepared import PreparedImages
from ear.training import Trainer

_WEIGHT_DECAY, _EMA_DECAY = 0.05, 0.99
_CHECKPOINTS = 10  # in all


def train_classifier(
    images: PreparedImages,
    *,
    total_images: int,  # seen in training
    batch_size: int,
    learning_rate: float,  # the peak; cosine decay to 0
    seed: int,
    folder: Path,  # for checkpoints, from which a killed training goes on
    device: torch.device,
) -> Classifier:
    """The averaged weights of a classifier trained on randomly shifted images."""
    seed = randomness.derive(seed, "classifier")
    order = randomness.DataOrder(len(images), seed)
    classifier = Classifier(len(images.classes), images.image_size)
    classifier.initialise(randomness.generator(seed, "weights")).to(device)

    def batches(positions: Iterator[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for position in positions:
            rows = order.indices(position, batch_size).numpy()
            yield to_signed(images.images(rows)), torch.from_numpy(images.labels[rows])

    def loss(batch, position: int):
        generator = randomness.generator(seed, "shift", position)
        return classifier.loss(batch[0].to(device), batch[1].to(device), generator), {}

    group = Group(list(classifier.parameters()), weight_decay=_WEIGHT_DECAY)
    trainer = Trainer(
        classifier,
        optimizer=adamw([group], learning_rate=learning_rate, beta1=0.9, beta2=0.99),
        loss=loss,
        rate=schedule("cosine", total_images=total_images, warmup_images=0),
        ema_decays={"average": _EMA_DECAY},
        clip_norm=1.0,
        global_batch_size=batch_size,
        micro_batch_size=batch_size,
    )
    interval = max(total_images // _CHECKPOINTS, batch_size)
    trainer.fit(batches, total_images=total_images, folder=folder, checkpoint_images=interval, title="classifier")
    return trainer.average.module
