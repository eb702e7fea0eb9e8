"""Training of a KL autoencoder on prepared images."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ear import config
from ear.config.checks import check_shares
from ear.data.images import to_signed
from ear.data.prepared import PreparedImages
from ear.display.live import Live
from ear.runtime import distributed, randomness
from ear.runtime.ahead import read_ahead
from ear.runtime.device import for_device, precise
from ear.tokenizer.autoencoder import KL, Tokenizer
from ear.tokenizer.critic import CriticTraining, PatchCritic
from ear.tokenizer.loss import AutoencoderLoss, Terms
from ear.training.ema import Average
from ear.training.optimizer import Group, adamw, schedule
from ear.training.trainer import History, Saving, Trainer, Validation

_WARMUP = 0.05  # share of the images
_PARTS = 10  # checkpoints and validations per training
_VALIDATION_IMAGES = 1024  # at most; held-out shards are stored shuffled
_CLIP_NORM = 1.0


class Objective:
    """The loss of batches of uint8 images; its noise is a function of (seed, purpose, position).

    precision: of the autoencoder: float32, tfloat32 or bfloat16. The losses use tfloat32 if that is set, else float32.
    """

    def __init__(self, loss: AutoencoderLoss, *, seed: int, device: torch.device, precision: str = "float32"):
        self.loss, self.seed, self.device, self.precision = loss, seed, device, precision

    def terms(self, tokenizer: Tokenizer, images: torch.Tensor, purpose: str, position: int) -> Terms:
        """Loss terms of one batch, [B, 3, H, W] in [-1, 1]."""
        side = images.shape[-1] // tokenizer.downsample
        source = randomness.stream(self.seed, purpose, position)
        noise = randomness.normal((len(images), tokenizer.latent_channels, side, side), source, self.device)
        return self.loss(tokenizer, images, noise, inside=lambda: precise(self.precision, self.device))

    def signed(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] => [B, 3, H, W] in [-1, 1] on the device."""
        return to_signed(images.to(self.device, non_blocking=True))

    @torch.no_grad()
    def held_out(self, tokenizer: Tokenizer, images: PreparedImages, batch_size: int) -> dict[str, float]:
        """Loss and figures on held-out images: means over at most 1024 images, shared by all ranks."""
        rows = min(len(images), _VALIDATION_IMAGES)
        names, sums = self.loss.figures, torch.zeros(1 + len(self.loss.figures), dtype=torch.float64)
        for start in distributed.own_slice(range(0, rows, batch_size)):
            pixels = images.images(np.arange(start, min(start + batch_size, rows)))
            batch = self.signed(for_device(pixels, self.device))
            terms = self.terms(tokenizer, batch, "validation", start)
            values = torch.stack([terms.loss, *(terms.figures[name] for name in names)])
            sums += values.double().cpu() * len(batch)
        return dict(zip(("loss", *names), (distributed.total(sums) / rows).tolist(), strict=True))


class AutoencoderTraining:
    """A trainer of `tokenizer`; data order and noise are functions of (seed, images seen).

    Raises UserError if the ranks cannot share the micro-batches of a step evenly.
    """

    def __init__(
        self,
        tokenizer: KL,
        options: config.Tokenizer,
        *,
        images: PreparedImages,
        held_out: PreparedImages,
        objective: Objective,
    ):
        keys = ("tokenizer.batch_size", "tokenizer.micro_batch_size")
        check_shares(options.batch_size, options.micro_batch_size, distributed.size(), keys)
        self.images, self.held_out, self.objective, self.options = images, held_out, objective, options
        self.tokenizer = tokenizer.to(objective.device)
        rate = schedule("cosine", total_images=options.images, warmup_images=int(_WARMUP * options.images))
        self.critic = None
        if options.adversarial_weight:
            network = PatchCritic().initialise(randomness.generator(objective.seed, "critic")).to(objective.device)
            self.critic = CriticTraining(network, options, rate=rate)
        groups = [Group(list(tokenizer.parameters()), weight_decay=0.0)]
        self.trainer = _Trainer(
            self.tokenizer,
            critic=self.critic,
            optimizer=adamw(groups, learning_rate=options.learning_rate, beta1=0.9, beta2=0.99),
            loss=self.loss,
            rate=rate,
            averages={"average": Average(tokenizer, options.ema_decay)},
            clip_norm=_CLIP_NORM,
            global_batch_size=options.batch_size,
            micro_batch_size=options.micro_batch_size,
        )

    def run(self, folder: Path, live: Live | None = None) -> tuple[KL, History]:
        """Train, resuming from the newest checkpoint in `folder` => (EMA weights, logs). live: shows the training."""
        part = max(self.options.images // _PARTS, 1)
        # TF32 is a global setting that backward passes also read, so set it here; autocast wraps forward passes only.
        everywhere = "tfloat32" if self.objective.precision == "tfloat32" else "float32"
        with precise(everywhere, self.objective.device):
            self.trainer.fit(
                self.batches,
                total_images=self.options.images,
                saving=Saving(folder=folder, interval=part),
                validation=Validation(measure=self.measure, interval=part),
                title="tokenizer",
                live=live,
            )
        return self.trainer.average.module, self.trainer.history

    def measure(self) -> dict[str, float]:
        """Loss and figures of the EMA weights on held-out images."""
        return self.objective.held_out(self.trainer.average.module, self.held_out, self.options.batch_size)

    def batches(self, positions: Iterator[int]) -> Iterator[torch.Tensor]:
        """The uint8 micro-batches that start at the given positions, on the host."""
        order, size = randomness.DataOrder(len(self.images), self.objective.seed), self.options.micro_batch_size

        def batch_at(position: int) -> torch.Tensor:
            return for_device(self.images.images(order.indices(position, size).numpy()), self.objective.device)

        return read_ahead(batch_at, positions)

    def loss(self, batch: torch.Tensor, position: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of one uint8 micro-batch, for the trainer; also trains the critic."""
        images = self.objective.signed(batch)
        terms = self.objective.terms(self.tokenizer, images, "training", position)
        if self.critic is None:
            return terms.loss, terms.figures
        adversarial, figures = self.critic(
            images, terms.decoded, terms.reconstruction, self.tokenizer.last_layer, position
        )
        return terms.loss + adversarial, terms.figures | figures


class _Trainer(Trainer):
    """A trainer whose steps and checkpoints include the critic's."""

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

    def restore(self, tensors: dict[str, torch.Tensor], *, images: int) -> None:
        super().restore(tensors, images=images)
        if self.critic:
            self.critic.restore(tensors)

    def resume(self, folder: Path) -> None:
        super().resume(folder)
        if self.critic:
            distributed.copy_from_main(self.critic.network.state_dict().values())
