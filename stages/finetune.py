"""Continue the training briefly at a lower training temperature and learning rate.

Reads data/latents and data/model: weights, EMAs and optimiser. Writes data/finetuned: EMA weights, logs and metrics. A
killed run resumes from its last checkpoint and ends in the same bytes (on CPUs, in as many processes).
"""

from dataclasses import dataclass
from typing import Annotated

from ear import config
from ear.errors import UserError
from ear.files.reading import reading
from ear.files.tensors import read_tensors
from ear.latents.statistics import Statistics
from ear.latents.store import LatentStore
from ear.lineage.run import Run
from ear.model.files import build_model, load_shape
from ear.model.training import Phase, PhaseSettings
from ear.runtime.device import prepare_device, set_precision
from stages import program

STATE = "data/model/state.safetensors"


@dataclass(frozen=True)
class Parameters:
    """What the stage depends on."""

    compute: config.Compute
    mirror: Annotated[bool, "data.mirror"]
    finetune: config.Finetune
    train: config.Train
    runtime: config.Runtime


def work(parameters: Parameters, run: Run) -> None:
    """Train from the state that the train stage left."""
    options = parameters.finetune
    device = prepare_device(parameters.runtime.device, parameters.compute.threads)
    set_precision(parameters.train.precision, device, key="train.precision")
    shape, description = load_shape("data/model/model.safetensors")
    state, progress = read_tensors(STATE)
    with reading(STATE, "training state", "run the train stage again"):
        earlier = int(progress["images"])
    store = LatentStore("data/latents", "train")
    if description["tokenizer"] != store.tokenizer:
        raise UserError(
            f"data/model/model.safetensors was trained on latents of tokenizer {description['tokenizer'][:12]}, but "
            f"data/latents come from {store.tokenizer[:12]}; run the train stage again."
        )
    phase = Phase(
        build_model(shape).to(device),
        PhaseSettings(
            name="finetune",
            images=options.images,
            learning_rate=options.learning_rate,
            schedule=options.schedule,
            warmup_images=0,
            temperature=options.temperature,
            earlier_images=earlier,
        ),
        parameters.train,
        store=store,
        held_out=LatentStore("data/latents", "val"),
        mirror=parameters.mirror,
        device=device,
        runtime=parameters.runtime,
        check=run.check,
        statistics=Statistics.from_dict(description["statistics"]),
    )
    phase.trainer.restore(state, images=earlier)
    scratch = run.scratch(program.plain(parameters), ["data/latents/stats.json", STATE])
    phase.run(scratch, run.kept, program.live("finetune", parameters, scratch, phase.monitor.figures))
    phase.publish(run.output("data/finetuned"))


if __name__ == "__main__":
    program.run("finetune", work, Parameters, __doc__, many_processes=True)
