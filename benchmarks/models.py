"""What several benchmarks measure: untrained models of a preset's size, and their training on random latents."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ear.commands.describe import data_facts
from ear.config import Parameters
from ear.latents.statistics import Statistics
from ear.model.autoregressive import AutoregressiveModel
from ear.model.files import build_model
from ear.model.shape import Shape
from ear.model.training import BatchLoss, PhaseSettings, build_trainer
from ear.runtime.randomness import generator, seed_dropout
from ear.tokenizer.autoencoder import PCA, Identity, Tokenizer, kl_structure, new_kl
from ear.training.trainer import LOG_STEPS, Trainer

PUBLISHED = ("imagenet256_base", "imagenet256_large", "imagenet256_huge")
INPUTS = ["data.path=unread", "tokenizer.weights=unread"]  # overrides: presets of ImageNet name files
_CODEBOOK_TOKENS = 4096  # random tokens that a codebook is fitted on
Batch = tuple[Tensor, Tensor]  # moments float16 [B, 2C, h, w], labels int64 [B]


def untrained(parameters: Parameters, *, side: int | None = None) -> AutoregressiveModel:
    """A model of these parameters in eval mode; `side` replaces the latent grid's side.

    It has as many classes as the images, or those of data/latents; ImageNet's if there are neither.
    """
    tokenizer = parameters.tokenizer
    channels = tokenizer.channels if tokenizer.name != "identity" else 3 * tokenizer.downsample**2
    side = side or parameters.data.image_size // tokenizer.downsample
    classes, _, _ = data_facts(parameters.data, classes=None, images=None)
    shape = Shape((channels, side, side), tuple(map(str, range(classes))), parameters.model, parameters.score.chosen)
    model = build_model(shape).initialise(generator(0, "weights"))
    if model.score.learns_tokens:
        tokens = torch.randn(_CODEBOOK_TOKENS, shape.token_channels, generator=generator(0, "tokens"))
        model.score.learn(tokens, 0)
    return model.eval()


def untrained_tokenizer(parameters: Parameters) -> Tokenizer:
    """A tokenizer of these parameters; one that would be imported has the structure that they name."""
    options, size = parameters.tokenizer, parameters.data.image_size
    if options.name == "identity":
        return Identity(image_size=size, downsample=options.downsample)
    if options.name == "pca":
        return PCA(image_size=size, downsample=options.downsample, channels=options.channels)
    structure = kl_structure(channels=options.channels, block_channels=options.block_channels, layers=options.layers)
    return new_kl(seed=0, image_size=size, structure=structure)


class Training:
    """The trainer and the loss of the train stage, on one random micro-batch again and again."""

    def __init__(self, model: AutoregressiveModel, parameters: Parameters, device: torch.device):
        options = parameters.train
        self.model, self.batch = model, random_batch(model, options.micro_batch_size, device)
        statistics = Statistics(0.0, 1.0, (0.0,), (1.0,))
        self._loss = BatchLoss(statistics, seed=0, precision=options.precision, device=device)
        settings = PhaseSettings(
            name="benchmark",
            images=options.images,
            learning_rate=options.learning_rate,
            schedule="constant",
            warmup_images=0,
            temperature=1.0,
        )
        self._steps = 0
        self.trainer: Trainer = build_trainer(model, settings, options, self.loss)

    def loss(self, batch: Batch, position: int) -> tuple[Tensor, dict[str, Tensor]]:
        """As ear.model.training.Phase.loss."""
        seed_dropout(0, position)
        loss = self._loss(self.model, *batch, position, temperature=1.0)
        return loss.value, loss.parts

    def step(self) -> None:
        """One optimiser step on a global batch, with a row of the log every 25 steps."""
        self.trainer.step(self._batches())
        self._steps += 1
        if self._steps % LOG_STEPS == 0:
            self.trainer.log()

    def _batches(self) -> Iterator[Batch]:
        return itertools.repeat(self.batch)


def random_batch(model: AutoregressiveModel, images: int, device: torch.device) -> Batch:
    """A micro-batch of random posteriors: means of a standard normal distribution, small variances."""
    channels, h, w = model.shape.latent
    mean = torch.randn((images, channels, h, w), generator=generator(0, "latents"))
    moments = torch.cat([mean, torch.full_like(mean, -5.0)], dim=1).half()
    return moments.to(device), (torch.arange(images) % len(model.shape.classes)).to(device)
