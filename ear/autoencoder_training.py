"""Training of a KL autoencoder on prepared images."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ear import randomness
from ear.autoencoder import KL, Tokenizer
from ear.autoencoder_loss import AutoencoderLoss, Terms
from ear.critic import CriticTraining, PatchCritic
from ear.images import to_signed
from ear.optimizer import Group, adamw, schedule
from ear.prepared import PreparedImages
from ear.training import History, Trainer

_WARMUP = 0.05  # share of the images
_PARTS = 10  # the training has as many checkpoints and validations
_VALIDATION_IMAGES = 1024  # at most; held-out shards are stored shuffled
_CLIP_NORM = 1.0


class Objective:
    """The loss of batches of uint8 images; its noise is a function of (seed, purpose, position)."""

    def __init__(self, loss: AutoencoderLoss, *, seed: int, device: torch.device):
        self.loss, self.seed, self.device = loss, seed, device

    def terms(self, tokenizer: Tokenizer, images: torch.Tensor, purpose: str, position: int) -> Terms:
        """Of one batch, [B, 3, H, W] in [-1, 1]."""
        side = images.shape[-1] // tokenizer.downsample
        generator = randomness.generator(self.seed, purpose, position)
        noise = randomness.normal((len(images), tokenizer.latent_channels, side, side), generator, self.device)
        return self.loss(tokenizer, images, noise)

    def signed(self, images: np.ndarray) -> torch.Tensor:
        """uint8 [B, H, W, 3] => [B, 3, H, W] in [-1, 1] on the device."""
        return to_signed(torch.from_numpy(images).to(self.device))

    @torch.no_grad()
    def held_out(self, tokenizer: Tokenizer, images: PreparedImages, batch_size: int) -> dict[str, float]:
        """Loss and its figures, means over up to 1024 images."""
        rows, means = min(len(images), _VALIDATION_IMAGES), {}
        for start in range(0, rows, batch_size):
            batch = self.signed(images.images(np.arange(start, min(start + batch_size, rows))))
            terms = self.terms(tokenizer, batch, "validation", start)
            for name, value in {"loss": terms.loss, **terms.figures}.items():
                means[name] = means.get(name, 0.0) + float(value) * len(batch) / rows
        return means


class AutoencoderTraining:
    """A trainer of `tokenizer`; order and noise are functions of (seed, images seen)."""

    def __init__(
        self,
        tokenizer: KL,
        *,
        images: PreparedImages,
        held_out: PreparedImages,
        objective: Objective,
        total_images: int,  # seen in training
        batch_size: int,  # images per step
        micro_batch_size: int,  # images per forward pass
        learning_rate: float,  # the peak, of the critic, too
        ema_decay: float,
        adversarial_weight: float = 0.0,  # 0 for no critic
        adversarial_start: int = 0,  # images; see `CriticTraining`
    ):
        self.images, self.held_out, self.objective = images, held_out, objective
        self.total_images, self.batch_size, self.micro_batch_size = total_images, batch_size, micro_batch_size
        self.tokenizer = tokenizer.to(objective.device)
        rate = schedule("cosine", total_images=total_images, warmup_images=int(_WARMUP * total_images))
        self.critic = None
        if adversarial_weight:
            network = PatchCritic().initialise(randomness.generator(objective.seed, "critic")).to(objective.device)
            options = {"weight": adversarial_weight, "start": adversarial_start, "batch_size": batch_size}
            self.critic = CriticTraining(network, learning_rate=learning_rate, rate=rate, **options)
        groups = [Group(list(tokenizer.parameters()), weight_decay=0.0)]
        self.trainer = _Trainer(
            self.tokenizer,
            critic=self.critic,
            optimizer=adamw(groups, learning_rate=learning_rate, beta1=0.9, beta2=0.99),
            loss=self.loss,
            rate=rate,
            ema_decays={"average": ema_decay},
            clip_norm=_CLIP_NORM,
            global_batch_size=batch_size,
            micro_batch_size=micro_batch_size,
        )

    def run(self, folder: Path) -> tuple[KL, History]:
        """The averaged weights and the logs; goes on from the newest checkpoint in `folder`."""
        part = max(self.total_images // _PARTS, 1)
        self.trainer.fit(
            self.batches,
            total_images=self.total_images,
            folder=folder,
            checkpoint_images=part,
            validate=lambda: self.objective.held_out(self.trainer.average.module, self.held_out, self.batch_size),
            validate_images=part,
            title="tokenizer",
        )
        return self.trainer.average.module, self.trainer.history

    def batches(self, positions: Iterator[int]) -> Iterator[np.ndarray]:
        """The uint8 micro-batches that start at the given positions of the training."""
        order = randomness.DataOrder(len(self.images), self.objective.seed)
        for position in positions:
            yield self.images.images(order.indices(position, self.micro_batch_size).numpy())

    def loss(self, batch: np.ndarray, position: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Of one uint8 micro-batch, for the trainer; the critic learns on the way."""
        images = self.objective.signed(batch)
        terms = self.objective.terms(self.tokenizer, images, "training", position)
        if self.critic is None:
            return terms.loss, terms.figures
        adversarial, figures = self.critic(
            images, terms.decoded, terms.reconstruction, self.tokenizer.last_layer, position
        )
        return terms.loss + adversarial, terms.figures | figures


class _Trainer(Trainer):
    """A trainer whose steps and checkpoints are the critic's, too."""

    def __init__(self, module: KL, *, critic: CriticTraining | None, **options):
        super().__init__(module, **options)
        self.critic = critic

    def step(self, micro_batches: Iterator) -> None:
        begun = self.images
        super().step(micro_batches)
        if self.critic:
            self.critic.step(begun)

    def state(self) -> dict[str, torch.Tensor]:
        return super().state() | (self.critic.state() if self.critic else {})

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        super().restore(tensors)
        if self.critic:
            self.critic.restore(tensors)
