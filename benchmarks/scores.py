"""How fast is each score in training and in sampling, the whole model included?

    python -m benchmarks.scores [--save]

Untrained models with the parameters of params.yaml on random latents. A training step is forward, backward, clipping,
optimiser and average on one global batch; sampling draws latents with sample.steps and sample.guidance, without the
tokenizer's decoder. Rules take turns, so that whatever else the machine does falls on all; the median turn counts.
"""

import itertools
import statistics
import time
from dataclasses import asdict

import torch

from benchmarks import measure
from ear import config, scores
from ear.model.autoregressive import AutoregressiveModel
from ear.model.files import build_model
from ear.model.shape import Shape
from ear.runtime.device import prepare_device
from ear.runtime.randomness import ImageStreams, generator
from ear.sampling.sampler import network_evaluations, sample
from ear.training import optimizer
from ear.training.trainer import Trainer
from flows import comparison, overrides

_STEPS = 3  # optimiser steps of one turn
_CODEBOOK_TOKENS = 4096  # random tokens that a codebook is learned from


class Candidate:
    """A rule with its model, its trainer and the seconds that its turns took."""

    def __init__(self, parameters: config.Parameters, device: torch.device):
        self.options, self.device = parameters, device
        self.model = untrained(parameters).to(device)
        self.trainer = self._trainer()
        self.training: list[float] = []  # seconds per image
        self.sampling: list[float] = []
        size = (parameters.train.micro_batch_size, *self.model.shape.latent)
        self.latents = torch.randn(size, generator=generator(0, "latents")).to(device)
        self.labels = torch.arange(parameters.sample.batch_size, device=device) % len(self.model.shape.classes)

    def _trainer(self) -> Trainer:
        options = self.options.train
        groups = self.model.parameter_groups(weight_decay=options.weight_decay, head_rate=options.head_rate)
        return Trainer(
            self.model,
            optimizer=optimizer.adamw(
                groups, learning_rate=options.learning_rate, beta1=options.beta1, beta2=options.beta2
            ),
            loss=self._loss,
            rate=lambda images: 1e-3,
            ema_decays={"average": options.ema_decay},
            clip_norm=options.clip_norm,
            global_batch_size=options.global_batch_size,
            micro_batch_size=options.micro_batch_size,
        )

    def _loss(self, batch, position: int):
        latents, labels = batch
        if self.model.score.targets > 1:
            latents = latents.expand(self.model.score.targets, *latents.shape)
        source = generator(0, "loss", position)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.train.precision == "bfloat16"):
            return self.model.loss(latents, labels, temperature=1.0, generator=source), {}

    def turn(self) -> None:
        """Train for a few steps and draw one batch."""
        options = self.options.sample
        batch = (self.latents, torch.arange(len(self.latents), device=self.device) % len(self.model.shape.classes))
        start = self._now()
        for _ in range(_STEPS):
            self.trainer.step(itertools.repeat(batch))
        between = self._now()
        sample(
            self.model.eval(),
            self.labels,
            steps=options.steps,
            guidance=options.guidance,
            schedule=options.schedule,
            temperature=options.temperature,
            source=ImageStreams(0, range(len(self.labels))),
        )
        self.training.append((between - start) / (_STEPS * self.trainer.global_batch_size))
        self.sampling.append((self._now() - between) / len(self.labels))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def figures(self) -> dict:
        """Rates (medians) and counts."""
        return {
            "facts": self.model.score.facts(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "training_images_per_second": 1 / statistics.median(self.training),
            "sampling_images_per_second": 1 / statistics.median(self.sampling),
            "evaluations_per_image": network_evaluations(self.model, self.options.sample.steps),
        }


def untrained(parameters: config.Parameters) -> AutoregressiveModel:
    """The model of these parameters."""
    side = parameters.data.image_size // parameters.tokenizer.downsample
    # Pixels as tokens have 3 channels for each pixel that a latent cell covers.
    pixels = 3 * parameters.tokenizer.downsample**2
    channels = parameters.tokenizer.channels if parameters.tokenizer.name == "kl" else pixels
    shape = Shape(
        (channels, side, side),
        tuple(map(str, range(10))),
        asdict(parameters.model),
        scores.chosen(asdict(parameters.score)),
    )
    model = build_model(shape).initialise(generator(0, "weights"))
    width = model.token_embedding.in_features
    model.score.learn(torch.randn(_CODEBOOK_TOKENS, width, generator=generator(0, "tokens")), 0)
    return model


def changed(path: str, values: comparison.Values) -> config.Parameters:
    """The parameter file at `path` with {"section.key": value} set."""
    return config.parse(overrides.plain(overrides.check(path, values)))


def main() -> None:
    """Measure the rules of the comparison."""
    parser = measure.arguments(__doc__)
    parser.add_argument("--params", default="params.yaml", help="parameter file (default: params.yaml)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of which the median counts (default: 5)")
    parser.add_argument("--rules", nargs="+", choices=comparison.RULES, default=[*comparison.RULES], metavar="RULE")
    arguments = parser.parse_args()
    parameters = config.load(arguments.params)
    device = prepare_device(parameters.runtime.device, parameters.compute.threads)
    candidates = {
        rule: Candidate(changed(arguments.params, comparison.RULES[rule]), device) for rule in arguments.rules
    }
    for _ in range(1 + arguments.rounds):
        for candidate in candidates.values():
            candidate.turn()
    for candidate in candidates.values():  # the first turn warms up
        del candidate.training[0], candidate.sampling[0]
    figures = {rule: candidate.figures() for rule, candidate in candidates.items()}
    options = {key: getattr(parameters.sample, key) for key in ("steps", "guidance", "batch_size")}
    measure.report("scores", {"sampling": options, "rules": figures}, save=arguments.save)


if __name__ == "__main__":
    main()
