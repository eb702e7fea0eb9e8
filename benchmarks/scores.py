"""Training and sampling speed of each score, with the complete model.

    python -m benchmarks.scores [--save]

Untrained models with the parameters of params.yaml on random latents. A training step is forward, backward, clipping,
optimiser and EMA on one global batch; sampling draws latents with sample.steps and sample.guidance, without the
decoder. Rules take turns, so other work on the machine affects all of them; the median turn counts.
"""

import statistics
import time

import torch

from benchmarks import measure
from benchmarks.comparison import plan
from benchmarks.models import Training, untrained
from ear import config
from ear.config import edit
from ear.runtime.device import device_name, precise, prepare_device
from ear.runtime.randomness import image_streams
from ear.sampling.sampler import network_evaluations, sample
from ear.sampling.settings import SamplingSettings

_STEPS = 3  # optimiser steps of one turn


class Candidate:
    """A rule with its model, its trainer and the seconds of its turns."""

    def __init__(self, parameters: config.Parameters, device: torch.device):
        self.options, self.device = parameters, device
        self.model = untrained(parameters).to(device)
        self._training = Training(self.model, parameters, device)
        self.training: list[float] = []  # seconds per image
        self.sampling: list[float] = []
        self.labels = torch.arange(parameters.sample.batch_size, device=device) % len(self.model.shape.classes)

    def turn(self) -> None:
        """Train for a few steps and draw one batch."""
        start = self._now()
        for _ in range(_STEPS):
            self._training.step()
        between = self._now()
        source = image_streams(0, range(len(self.labels)))
        options = self.options.sample
        with precise(options.precision, self.device):
            sample(self.model.eval(), self.labels.tolist(), SamplingSettings.of(options), source=source)
        self.training.append((between - start) / (_STEPS * self.options.train.global_batch_size))
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
            "evaluations_per_image": network_evaluations(self.model, SamplingSettings.of(self.options.sample)),
        }


def changed(path: str, values: plan.Values) -> config.Parameters:
    """The parameter file at `path` with {"section.key": value} set."""
    return edit.check(path, values)


def main() -> None:
    """Measure the rules of the comparison."""
    parser = measure.arguments(__doc__)
    parser.add_argument("--params", default="params.yaml", help="parameter file (default: params.yaml)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: compute.threads of the parameter file)")
    parser.add_argument("--rounds", type=int, default=5, help="turns; the median is reported (default: 5)")
    parser.add_argument("--rules", nargs="+", choices=plan.RULES, default=[*plan.RULES], metavar="RULE")
    arguments = parser.parse_args()
    parameters = config.load(arguments.params)
    device = prepare_device(parameters.runtime.device, arguments.threads or parameters.compute.threads)
    candidates = {rule: Candidate(changed(arguments.params, plan.RULES[rule]), device) for rule in arguments.rules}
    for _ in range(1 + arguments.rounds):
        for candidate in candidates.values():
            candidate.turn()
    for candidate in candidates.values():  # the first turn is a warm-up
        del candidate.training[0], candidate.sampling[0]
    figures = {rule: candidate.figures() for rule, candidate in candidates.items()}
    options = {key: getattr(parameters.sample, key) for key in ("steps", "guidance", "batch_size", "precision")}
    options |= {"device": device_name(device), "threads": torch.get_num_threads()}
    measure.report("scores", {"sampling": options, "rules": figures}, arguments)


if __name__ == "__main__":
    main()
