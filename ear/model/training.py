"""One phase of training on cached latents: the first training, or the short fine-tuning after it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ear import config
from ear.config.checks import check_shares
from ear.display.live import Live
from ear.files.atomic import link, whole_folder
from ear.files.json_files import rounded, write_json
from ear.files.tables import write_table
from ear.files.tensors import write_tensors
from ear.latents.batches import latent_batches
from ear.latents.statistics import Statistics, normalised
from ear.latents.store import LatentStore
from ear.model.autoregressive import AutoregressiveModel, MeanLoss
from ear.model.files import FILE, describe
from ear.model.monitoring import Monitor
from ear.model.tokens import patchify
from ear.runtime import distributed, randomness
from ear.runtime.sharding import host_copies
from ear.training import checkpoint
from ear.training.ema import Average
from ear.training.optimizer import Group, MuonAdamW, adamw, schedule
from ear.training.trainer import History, Saving, Trainer, Validation

_VALIDATION_IMAGES = 4096  # at most; held-out shards are stored shuffled
_CODEBOOK_IMAGES = 4096  # training images, at most, that a codebook is fitted on
_REFERENCE_IMAGES = 512  # training images, at most, behind the losses to compare with
_COPIES = 4  # of the weights, in float32: weights, gradients, two EMAs
_FLOAT = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """What distinguishes one phase of training from another."""

    name: str  # of the stage; seeds data order, masks and noise of the phase
    images: int  # training images, counted with repetition
    learning_rate: float  # peak
    schedule: str  # constant or cosine
    warmup_images: int
    temperature: float  # training temperature of the score
    earlier_images: int = 0  # of earlier phases; counts towards the EMA warm-up


@dataclass(frozen=True)
class BatchLoss:
    """The training loss of a micro-batch of posterior moments: draw latents, mask, predict, score."""

    statistics: Statistics  # that normalise the latents
    seed: int
    precision: str  # float32, tfloat32 or bfloat16 (autocast)
    device: torch.device

    def __call__(
        self,
        model: AutoregressiveModel,
        moments: Tensor,  # float16 [B, 2C, h, w]
        labels: Tensor,  # int64 [B]
        position: int,  # of the micro-batch's first image in the training
        *,
        temperature: float,
        purpose: str = "loss",  # with the position, names the random stream
    ) -> MeanLoss:
        """The mean loss per predicted token. Posterior draws, masks and noise depend on (seed, purpose, position)."""
        source = randomness.stream(self.seed, purpose, position)
        moments = moments.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        draws = (model.score.targets, len(moments), moments.shape[1] // 2, *moments.shape[2:])
        latents = normalised(moments, randomness.normal(draws, source, self.device), self.statistics)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return model.loss(latents, labels, temperature=temperature, source=source)


class Phase:
    """A trainer of a model on cached latents with the settings of one phase."""

    def __init__(
        self,
        model: AutoregressiveModel,  # on `device`
        settings: PhaseSettings,
        options: config.Train,
        *,
        store: LatentStore,  # training latents
        held_out: LatentStore,
        mirror: bool,  # also train on mirror images
        device: torch.device,
        runtime: config.Runtime,
        check: Callable[[], None] | None = None,  # called after each row of the log; raises to stop the training
        statistics: Statistics | None = None,  # that normalise the latents; default: their own
    ):
        keys = ("train.global_batch_size", "train.micro_batch_size")
        check_shares(options.global_batch_size, options.micro_batch_size, distributed.size(), keys)
        self.settings, self.options, self.device = settings, options, device
        self.store, self.held_out, self.mirror, self.workers = store, held_out, mirror, runtime.workers
        self.runtime, self.check = runtime, check
        self.seed = randomness.derive(options.seed, settings.name)
        self.statistics = statistics or store.statistics
        latents = {"statistics": self.statistics.as_dict(), "tokenizer": store.tokenizer}
        self.about = describe(model, latents)
        self.batch_loss = BatchLoss(self.statistics, self.seed, options.precision, device)
        tokens = training_tokens(model, store, self.seed, self.statistics, _REFERENCE_IMAGES)
        self.monitor = Monitor(model, tokens, settings.temperature, device)
        self.sharded = runtime.sharded and distributed.size() > 1
        self.trainer = build_trainer(model, settings, options, self.loss, sharded=self.sharded)
        model.transformer.checkpointing = runtime.checkpointing
        if runtime.compile and device.type == "cuda":
            model.compile_parts()

    def run(self, folder: Path, kept: Path, live: Live | None = None) -> None:
        """Train to the end, resuming from checkpoints in `folder`; with 0 images, only validate.

        kept: folder in which a checkpoint stays every `runtime.keep_images` images. live: shows the training.
        """
        runtime = self.runtime
        saving = Saving(
            folder=folder,
            interval=runtime.checkpoint_images,
            about=self.about,
            kept=kept,
            keep_interval=runtime.keep_images,
        )
        if not self.settings.images:
            self.trainer.save(saving)
            self.trainer.finish_saving()
            metrics = {"images": 0, **self.validate()}
            # The columns that every score's log has; the loss is the validation loss.
            row = {"images": 0, "loss": metrics["loss"], "gradient_norm": 0.0, "rate": 0.0}
            self.trainer.history = History([row], [metrics])
            return
        if distributed.is_main():
            print("\n".join(self.introduction()), flush=True)
        self.trainer.fit(
            self.batches,
            total_images=self.settings.images,
            saving=saving,
            validation=Validation(measure=self.validate, interval=self.options.validate_images),
            check=self.check,
            title=self.settings.name,
            live=live,
        )

    def introduction(self) -> list[str]:
        """Lines for the log: model size, memory, batches, learning rate, and what to expect of the EMA."""
        options, world_size = self.options, distributed.size()
        parameters = sum(p.numel() for p in self.trainer.module.parameters())
        numbers = _COPIES * parameters + optimizer_numbers(self.trainer.module, options.optimizer)
        state = numbers * _FLOAT / (world_size if self.sharded else 1)
        step, micro = options.global_batch_size, options.micro_batch_size
        base = max(group["base"] for group in self.trainer.optimizer.param_groups)
        lengths = [1 / (1 - decay) for decay in (options.ema_decay, options.ema_decay_long)]
        return [
            f"{self.settings.name}: {parameters:,} parameters, {options.precision} on {self.device}; "
            f"{state / 1e9:.2f} GB per process for weights, gradients, moments and EMAs, plus activations",
            f"{len(self.store):,} images; {-(-self.settings.images // step):,} steps of {step} images = {world_size} "
            f"process(es) x {step // micro // world_size} micro-batch(es) x {micro}; peak rate {base:g}",
            "EMA averages roughly the last 1/9 of training, at most "
            f"{lengths[0]:,.0f} and {lengths[1]:,.0f} steps; expect it to lag at first, then beat the raw weights",
        ]

    def batches(self, positions: Iterator[int]):
        """The micro-batches that start at the given image positions."""
        return latent_batches(
            self.store,
            order=randomness.DataOrder(len(self.store), self.seed),
            positions=positions,
            micro_batch_size=self.options.micro_batch_size,
            mirror=self.mirror,
            seed=self.seed,
            workers=self.workers,
            pinned=self.device.type == "cuda",
        )

    def loss(self, batch, position: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch (moments, labels, ...) and its parts, for the trainer."""
        randomness.seed_dropout(self.seed, position)
        moments, labels = batch[0], batch[1]
        temperature = self.settings.temperature
        loss = self.batch_loss(self.trainer.module, moments, labels, position, temperature=temperature)
        self.monitor.saw(loss)
        return loss.value, loss.parts

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses on held-out latents at training temperature 1, of the raw weights and of each EMA.

        Ranks share the micro-batches; each rank returns the losses over all of them.
        """
        averages = {name: average.module for name, average in self.trainer.averages.items()}
        models = [self.trainer.module.eval(), *averages.values()]
        size, rows = self.options.micro_batch_size, min(len(self.held_out), _VALIDATION_IMAGES)
        sums = torch.zeros(len(models), dtype=torch.float64)
        starts = range(0, rows, size)
        for start in distributed.own_slice(starts):
            indices = torch.arange(start, min(start + size, rows))
            sums += torch.stack(self._held_out_losses(models, indices)).double().cpu() * len(indices)
        if self.sharded and len(distributed.own_slice(starts)) * distributed.size() < len(starts):
            self._held_out_losses(models, torch.arange(1))  # the others still compute and need this rank's shards
        means = (distributed.total(sums) / rows).tolist()
        return dict(zip(["loss", *(f"{name}_loss" for name in averages)], means, strict=True))

    def _held_out_losses(self, models: Sequence[AutoregressiveModel], rows: Tensor) -> list[Tensor]:
        """The loss of each model on a micro-batch of held-out latents."""
        moments, labels, first = *self.held_out.rows(rows), int(rows[0])
        return [
            self.batch_loss(model, moments, labels, first, temperature=1, purpose="validation").value
            for model in models
        ]

    def publish(self, target: str | Path, *, state_from: Path | None = None) -> None:
        """Write EMA weights, logs and metrics into the folder `target`, from rank 0; all ranks must call it together.

        state_from: folder of the checkpoints, of which the last becomes the training state of a following phase.
        """
        weights, history = host_copies(self.trainer.average.module.state_dict()), self.trainer.history
        if not distributed.is_main():
            return
        with whole_folder(target) as folder:
            write_tensors(folder / FILE, weights, self.about)
            if state_from:
                link(checkpoint.at(state_from, self.trainer.images), folder / "state.safetensors")
            write_table(folder / "training.tsv", history.training)
            write_table(folder / "validation.tsv", history.validation)
            metrics = {
                "images": self.trainer.images,
                "parameters": sum(p.numel() for p in self.trainer.module.parameters()),
                "training_loss": history.training[-1]["loss"],
                "validation_loss": history.validation[-1]["loss"],
                "validation_loss_averaged": history.validation[-1]["averaged_loss"],
                "validation_loss_averaged_long": history.validation[-1]["averaged_long_loss"],
            }
            write_json(folder / "metrics.json", rounded(metrics))


def build_trainer(
    model: AutoregressiveModel,
    settings: PhaseSettings,
    options: config.Train,
    loss: Callable[[Any, int], tuple[Tensor, dict[str, Tensor]]],  # of a micro-batch that starts at a position
    *,
    sharded: bool = False,  # divide weights, moments and EMAs among the ranks
) -> Trainer[AutoregressiveModel]:
    """The trainer of a phase: AdamW or Muon over the published parameter groups, and two EMAs."""
    decays = {"averaged": options.ema_decay, "averaged_long": options.ema_decay_long}
    device = model.positions.device
    model = model.cpu() if sharded else model  # no device needs memory for whole copies
    averages = {name: Average(model, decay) for name, decay in decays.items()}
    if sharded:
        for network in (model, *(average.module for average in averages.values())):
            network.shard(device)
    groups = parameter_groups(model, weight_decay=options.weight_decay, head_rate=options.head_rate)
    rates = {"learning_rate": settings.learning_rate, "beta1": options.beta1, "beta2": options.beta2}
    muon = options.optimizer == "muon"
    return Trainer(
        model,
        optimizer=MuonAdamW(groups, block_matrices(model), **rates) if muon else adamw(groups, **rates),
        loss=loss,
        rate=schedule(settings.schedule, total_images=settings.images, warmup_images=settings.warmup_images),
        averages=averages,
        clip_norm=options.clip_norm,
        global_batch_size=options.global_batch_size,
        micro_batch_size=options.micro_batch_size,
        earlier_images=settings.earlier_images,
    )


def parameter_groups(model: AutoregressiveModel, *, weight_decay: float, head_rate: float) -> list[Group]:
    """The published groups: vectors and biases; head matrices, at `head_rate`; other matrices, with weight decay."""
    head = {id(p) for p in model.score.parameters() if p.dim() > 1}
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    return [
        Group(vectors, weight_decay=0.0),
        Group([p for p in matrices if id(p) in head], weight_decay=0.0, rate=head_rate),
        Group([p for p in matrices if id(p) not in head], weight_decay=weight_decay),
    ]


def block_matrices(model: AutoregressiveModel) -> list[nn.Parameter]:
    """The matrices inside the residual blocks of transformer and head; embeddings and projections are outside."""
    return [p for name, p in model.named_parameters() if ".blocks." in name and p.dim() == 2]


def optimizer_numbers(model: AutoregressiveModel, optimizer: str) -> int:
    """Number of values in the optimiser's state: two per parameter, or one if Muon updates the parameter."""
    own = block_matrices(model) if optimizer == "muon" else []
    return 2 * sum(p.numel() for p in model.parameters()) - sum(matrix.numel() for matrix in own)


def fit_codebook(model: AutoregressiveModel, store: LatentStore, seed: int) -> None:
    """Fit the score's codebook on training tokens, if it has one."""
    if not model.score.learns_tokens:
        return
    model.score.learn(training_tokens(model, store, seed, store.statistics, _CODEBOOK_IMAGES), seed)


def training_tokens(
    model: AutoregressiveModel, store: LatentStore, seed: int, statistics: Statistics, images: int
) -> Tensor:
    """float32 [N, D]: the tokens of at most `images` training images, image by image, drawn from their posteriors."""
    moments, _ = store.rows(randomness.DataOrder(len(store), seed).indices(0, min(len(store), images)))
    shape = (len(moments), moments.shape[1] // 2, *moments.shape[2:])
    noise = randomness.normal(shape, randomness.stream(seed, "tokens"))
    return patchify(normalised(moments, noise, statistics), model.patch).flatten(0, 1)
