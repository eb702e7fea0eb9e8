"""Train the autoregressive transformer on cached latents by maximising the selected score.

Reads data/latents and, if train.weights names one, a published checkpoint to start from (DVC does not track that file).
Writes data/model: EMA weights, the complete training state, logs and metrics. A killed run resumes from its last
checkpoint and ends in the same bytes (on CPUs, in as many processes). A finished training is extended if train.images
alone grew and the schedule is constant.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ear import config
from ear.files.atomic import link
from ear.files.tensors import read_description
from ear.latents.store import LatentStore
from ear.lineage.run import Run
from ear.model import interop
from ear.model.files import build_model
from ear.model.shape import Shape
from ear.model.training import Phase, PhaseSettings, fit_codebook
from ear.runtime import distributed, randomness
from ear.runtime.device import prepare_device, set_precision
from ear.training import checkpoint
from stages import program

STATE = "data/model/state.safetensors"


@dataclass(frozen=True)
class Parameters:
    """What the stage depends on."""

    compute: config.Compute
    mirror: Annotated[bool, "data.mirror"]
    model: config.Model
    score: config.Score
    train: config.Train
    runtime: config.Runtime


def work(parameters: Parameters, run: Run) -> None:
    """Train from new or published weights."""
    options = parameters.train
    device = prepare_device(parameters.runtime.device, parameters.compute.threads)
    set_precision(options.precision, device, key="train.precision")
    store = LatentStore("data/latents", "train")
    shape = Shape(store.shape, store.classes, parameters.model, parameters.score.chosen)
    generator = randomness.generator(options.seed, "weights")
    model = build_model(shape).initialise(generator, options.embedding_sd).to(device)
    if options.weights:
        interop.load_into(model, options.weights)
    inputs = ["data/latents/stats.json", *([options.weights] if options.weights else [])]
    scratch = run.scratch(program.plain(parameters), inputs)
    resumes = distributed.from_main(lambda: continue_shorter(options, run, scratch))
    if not (options.weights or resumes):
        fit_codebook(model, store, options.seed)
    phase = Phase(
        model,
        PhaseSettings(
            name="train",
            images=options.images,
            learning_rate=options.learning_rate,
            schedule=options.schedule,
            warmup_images=options.warmup_images,
            temperature=options.temperature,
        ),
        options,
        store=store,
        held_out=LatentStore("data/latents", "val"),
        mirror=parameters.mirror,
        device=device,
        runtime=parameters.runtime,
        check=run.check,
        statistics=interop.published_statistics(store.shape[0]) if options.weights else None,
    )
    phase.run(scratch, run.kept, program.live("train", parameters, scratch, phase.monitor.figures))
    phase.publish(run.output("data/model"), state_from=scratch)


def continue_shorter(options: config.Train, run: Run, scratch: Path) -> bool:
    """Start from the end of a finished training of fewer images, if a longer one would have passed through it.

    Returns whether there is a checkpoint to start from.
    """
    if checkpoint.newest(scratch):
        return True
    state, obstacle = run.shorter("train.images", STATE)
    if options.schedule != "constant" and state:
        obstacle = f"train.schedule is {options.schedule}, but must be constant, whose rate ignores train.images"
    if obstacle:
        print(f"train: starts anew, since it cannot extend a shorter training: {obstacle}", flush=True)
    elif state:
        link(state, checkpoint.at(scratch, read_description(state)["images"]))
    return checkpoint.newest(scratch) is not None


if __name__ == "__main__":
    program.run("train", work, Parameters, __doc__, many_processes=True)
