"""What the two training stages share: one phase of training on cached latents."""

from collections.abc import Iterator
from pathlib import Path

import torch

from ear import device as devices
from ear import distributed, randomness
from ear import model as models
from ear.config import Runtime, Train
from ear.latents import LatentStore, Statistics, latent_batches, normalised
from ear.model import Model
from ear.optimizer import adamw, schedule
from ear.records import rounded, whole_folder, write_json, write_tensors
from ear.training import History, Trainer, write_table

_VALIDATION_IMAGES = 4096  # at most; held-out shards are stored shuffled
_LEARNED_IMAGES = 4096  # at most, that a codebook comes of
_STATE_BYTES = 24  # per parameter: weight, gradient, two moments, two averages in float32


class Phase:
    """A trainer of `model` on the latents of data/latents, with the settings of one phase."""

    def __init__(
        self,
        model: Model,
        *,
        name: str,  # of the stage; another phase draws other noise
        options: Train,
        images: int,  # of this phase
        learning_rate: float,
        rate_schedule: str,
        warmup_images: int,
        temperature: float,
        mirror: bool,
        device: torch.device,
        runtime: Runtime,
        statistics: Statistics | None = None,  # that normalise the latents; by default their own
        earlier_images: int = 0,  # seen in earlier phases
    ):
        self.options, self.images, self.temperature, self.device = options, images, temperature, device
        self.mirror, self.workers, self.name = mirror, runtime.workers, name
        self.seed = randomness.derive(options.seed, name)
        self.store, self.held_out = LatentStore("data/latents", "train"), LatentStore("data/latents", "val")
        self.statistics = statistics or self.store.statistics
        groups = model.parameter_groups(weight_decay=options.weight_decay, head_rate=options.head_rate)
        self.trainer = Trainer(
            model,
            optimizer=adamw(groups, learning_rate=learning_rate, beta1=options.beta1, beta2=options.beta2),
            loss=self.loss,
            rate=schedule(rate_schedule, total_images=images, warmup_images=warmup_images),
            ema_decays={"averaged": options.ema_decay, "averaged_long": options.ema_decay_long},
            clip_norm=options.clip_norm,
            global_batch_size=options.global_batch_size,
            micro_batch_size=options.micro_batch_size,
            earlier_images=earlier_images,
        )
        model.transformer.checkpointing = runtime.checkpointing
        if runtime.compile and device.type == "cuda":
            devices.compile_in_place(model.transformer)

    def run(self, folder: Path) -> None:
        """Train to the end, resuming from the checkpoints in `folder`; with no images to see, only validate."""
        if not self.images:
            figures = {"images": 0, **self.validate()}
            # The log has the columns of a training; its loss is the validation's.
            row = {"images": 0, "loss": figures["loss"], "gradient_norm": 0.0, "rate": 0.0}
            self.trainer.history = History([row], [figures])
            return
        if distributed.is_main():
            print("\n".join(self.introduction()), flush=True)
        self.trainer.fit(
            self.batches,
            total_images=self.images,
            folder=folder,
            checkpoint_images=self.options.checkpoint_images,
            validate=self.validate,
            validate_images=self.options.validate_images,
            title=self.name,
        )

    def introduction(self) -> list[str]:
        """What a person wants to see before waiting for it: sizes, batches, rate, memory, and what is normal."""
        options, processes = self.options, distributed.size()
        parameters = sum(p.numel() for p in self.trainer.module.parameters())
        step, micro = options.global_batch_size, options.micro_batch_size
        base = max(group["base"] for group in self.trainer.optimizer.param_groups)
        return [
            f"{self.name}: {parameters:,} parameters, {options.precision} on {self.device}; "
            f"{parameters * _STATE_BYTES / 1e9:.2f} GB for weights, gradients, moments, averages; activations extra",
            f"{len(self.store):,} images; {-(-self.images // step):,} steps of {step} images = {processes} process(es) "
            f"x {step // micro // processes} micro-batch(es) x {micro}; peak rate {base:g}",
            "the averages follow the last ninth of the steps done, in the end "
            f"{1 / (1 - options.ema_decay):,.0f} and {1 / (1 - options.ema_decay_long):,.0f} steps; "
            "they may score worse than the weights early on and should lead later",
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
        )

    def loss(self, batch, position: int):
        """Loss of one micro-batch: draw from the tokenizer's posterior, then mask, predict and score."""
        moments, labels = batch[0], batch[1]
        randomness.seed_dropout(self.seed, position)
        return self._loss(self.trainer.module, moments, labels, "loss", position, self.temperature), {}

    def _loss(self, model: Model, moments, labels, purpose: str, position: int, temperature: float):
        generator = randomness.generator(self.seed, purpose, position)
        moments, labels = moments.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        draws = (model.score.targets, len(moments), moments.shape[1] // 2, *moments.shape[2:])
        latents = normalised(moments, randomness.normal(draws, generator, self.device), self.statistics)
        with self._autocast():
            return model.loss(latents, labels, temperature=temperature, generator=generator)

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16")

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on held-out latents at training temperature 1, of the raw and of the averaged weights.

        The processes share the micro-batches; each has the result.
        """
        averages = {name: average.module for name, average in self.trainer.averages.items()}
        models = [self.trainer.module.eval(), *averages.values()]
        size, rows = self.options.micro_batch_size, min(len(self.held_out), _VALIDATION_IMAGES)
        sums = torch.zeros(len(models), dtype=torch.float64)
        for start in distributed.share(range(0, rows, size)):
            indices = torch.arange(start, min(start + size, rows))
            batch = map(torch.as_tensor, self.held_out.rows(indices, torch.zeros(len(indices), dtype=torch.bool)))
            moments, labels = batch
            losses = [self._loss(model, moments, labels, "validation", start, 1) for model in models]
            sums += torch.stack(losses).double().cpu() * len(indices)
        means = (distributed.total(sums) / rows).tolist()
        return dict(zip(["loss", *(f"{name}_loss" for name in averages)], means, strict=True))

    def publish(self, target: str, *, keep_state: bool) -> None:
        """Write the averaged weights, the logs and the metrics (and the whole state, if another phase follows)."""
        if not distributed.is_main():
            return
        history, model = self.trainer.history, self.trainer.average.module
        with whole_folder(target) as folder:
            description = {"statistics": self.statistics.as_dict(), "tokenizer": self.store.tokenizer}
            models.save(folder / "model.safetensors", model, description)
            if keep_state:
                write_tensors(folder / "state.safetensors", self.trainer.state(), {"images": self.trainer.images})
            write_table(folder / "training.tsv", history.training)
            write_table(folder / "validation.tsv", history.validation)
            figures = {
                "images": self.trainer.images,
                "parameters": sum(p.numel() for p in model.parameters()),
                "training_loss": history.training[-1]["loss"],
                "validation_loss": history.validation[-1]["loss"],
                "validation_loss_averaged": history.validation[-1]["averaged_loss"],
                "validation_loss_averaged_long": history.validation[-1]["averaged_long_loss"],
            }
            write_json(folder / "metrics.json", rounded(figures))


def learn_tokens(model: Model, store: LatentStore, seed: int) -> None:
    """Show a score that wants to see them the tokens of some images before training (a codebook comes of them)."""
    if not model.score.learns_tokens:
        return
    rows = randomness.DataOrder(len(store), seed).indices(0, min(len(store), _LEARNED_IMAGES))
    moments, _ = map(torch.as_tensor, store.rows(rows, torch.zeros(len(rows), dtype=torch.bool)))
    shape = (len(moments), moments.shape[1] // 2, *moments.shape[2:])
    noise = randomness.normal(shape, randomness.generator(seed, "tokens"))
    tokens = models.patchify(normalised(moments, noise, store.statistics), model.patch)
    model.score.learn(tokens.flatten(0, 1), seed)


def start(parameters) -> torch.device:
    """The device, with the tracked number of threads and precision."""
    device = devices.prepare(parameters.runtime.device, parameters.compute.threads)
    devices.set_precision(parameters.train.precision, device, key="train.precision")
    return device
