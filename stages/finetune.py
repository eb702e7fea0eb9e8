"""The second phase: a short training at a lower training temperature and rate.

Continues the weights, their average and the optimiser of data/model; writes data/finetuned.
"""

from ear import model as models
from ear import records
from ear.latents import Statistics
from stages import phase, program

STATE = "data/model/state.safetensors"


def work(parameters) -> None:
    """The second phase, from the state that the first one left."""
    device = phase.start(parameters)
    trained, description = models.load("data/model/model.safetensors")
    state, seen = records.read_tensors(STATE)
    model = models.build(trained.shape).to(device)
    training = phase.Phase(
        model,
        name="finetune",
        options=parameters.train,
        images=parameters.finetune.images,
        learning_rate=parameters.finetune.learning_rate,
        rate_schedule=parameters.finetune.schedule,
        warmup_images=0,
        temperature=parameters.finetune.temperature,
        mirror=parameters.data.mirror,
        device=device,
        runtime=parameters.runtime,
        statistics=Statistics(**description["statistics"]),
        earlier_images=seen["images"],
    )
    if description["tokenizer"] != training.store.tokenizer:
        raise ValueError(
            f"data/model/model.safetensors was trained on latents of tokenizer {description['tokenizer'][:12]}, but "
            f"data/latents come from {training.store.tokenizer[:12]}; run the train stage again."
        )
    training.trainer.restore(state)
    training.run(program.scratch("finetune", parameters, ["data/latents/stats.json", "data/model/metrics.json", STATE]))
    training.publish("data/finetuned", keep_state=False)


if __name__ == "__main__":
    program.run("finetune", work, __doc__, many_processes=True)
