"""Training of a KL autoencoder on prepared images."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ear import randomness
from ear.autoencoder import KL
from ear.autoencoder_loss import autoencoder_loss
from ear.images import to_signed
from ear.optimizer import Group, adamw, schedule
from ear.prepared import PreparedImages
from ear.training import History, Trainer

_WARMUP = 0.05  # share of the images
_PARTS = 10  # the training has as many checkpoints and validations
_VALIDATION_IMAGES = 1024  # at most; held-out shards are stored shuffled
_CLIP_NORM = 1.0


class AutoencoderTraining:
    """A trainer of `tokenizer`; order and noise are functions of (seed, images seen)."""

    def __init__(
        self,
        tokenizer: KL,
        *,
        images: PreparedImages,
        held_out: PreparedImages,
        kl_weight: float,  # see `autoencoder_loss`
        total_images: int,  # seen in training
        batch_size: int,  # images per step
        learning_rate: float,  # the peak
        ema_decay: float,
        seed: int,
        device: torch.device,
    ):
        self.images, self.held_out, self.kl_weight, self.seed = images, held_out, kl_weight, seed
        self.total_images, self.batch_size, self.device = total_images, batch_size, device
        groups = [Group(list(tokenizer.parameters()), weight_decay=0.0)]
        self.trainer = Trainer(
            tokenizer.to(device),
            optimizer=adamw(groups, learning_rate=learning_rate, beta1=0.9, beta2=0.99),
            loss=lambda batch, position: self.loss(tokenizer, batch, "training", position),
            rate=schedule("cosine", total_images=total_images, warmup_images=int(_WARMUP * total_images)),
            ema_decay=ema_decay,
            clip_norm=_CLIP_NORM,
            global_batch_size=batch_size,
            micro_batch_size=batch_size,
        )

    def run(self, folder: Path) -> tuple[KL, History]:
        """The averaged weights and the logs; goes on from the newest checkpoint in `folder`."""
        part = max(self.total_images // _PARTS, 1)
        self.trainer.fit(
            self.batches,
            total_images=self.total_images,
            folder=folder,
            checkpoint_images=part,
            validate=self.validate,
            validate_images=part,
            title="tokenizer",
        )
        return self.trainer.average.module, self.trainer.history

    def batches(self, start: int) -> Iterator[np.ndarray]:
        """Endless uint8 batches from image position `start`."""
        order = randomness.DataOrder(len(self.images), self.seed)
        for position in itertools.count(start, self.batch_size):
            yield self.images.images(order.indices(position, self.batch_size).numpy())

    def loss(self, tokenizer: KL, batch: np.ndarray, purpose: str, position: int) -> tuple[Tensor, dict[str, Tensor]]:
        """`autoencoder_loss` of one uint8 batch, with noise of (seed, purpose, position)."""
        side = batch.shape[1] // tokenizer.downsample
        generator = randomness.generator(self.seed, purpose, position)
        noise = randomness.normal((len(batch), tokenizer.latent_channels, side, side), generator, self.device)
        images = to_signed(torch.from_numpy(batch).to(self.device))
        return autoencoder_loss(tokenizer, images, noise, kl_weight=self.kl_weight)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and its parts on held-out images, of the averaged weights."""
        rows, means = min(len(self.held_out), _VALIDATION_IMAGES), {}
        for start in range(0, rows, self.batch_size):
            batch = self.held_out.images(np.arange(start, min(start + self.batch_size, rows)))
            loss, parts = self.loss(self.trainer.average.module, batch, "validation", start)
            for name, value in {"loss": loss, **parts}.items():
                means[name] = means.get(name, 0.0) + float(value) * len(batch) / rows
        return means
