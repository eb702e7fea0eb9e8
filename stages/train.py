"""Train the autoregressive transformer on cached latents by maximising the selected score.

Reads data/latents; writes data/model: averaged weights, the whole training state, logs and metrics. A killed run goes
on from its last checkpoint and ends in the same bytes.
"""

from dataclasses import asdict

from ear import model as models
from ear import randomness, scores
from ear.latents import LatentStore
from ear.model import Shape
from stages import phase, program


def work(parameters) -> None:
    """The first phase."""
    device = phase.start(parameters)
    options = parameters.train
    store = LatentStore("data/latents", "train")
    shape = Shape(store.shape, tuple(store.classes), asdict(parameters.model), scores.chosen(asdict(parameters.score)))
    model = models.build(shape).initialise(randomness.generator(options.seed, "weights")).to(device)
    phase.learn_tokens(model, store, options.seed)
    training = phase.Phase(
        model,
        name="train",
        options=options,
        images=options.images,
        learning_rate=options.learning_rate,
        rate_schedule=options.schedule,
        warmup_images=options.warmup_images,
        temperature=options.temperature,
        mirror=parameters.data.mirror,
        device=device,
        runtime=parameters.runtime,
    )
    training.run(program.scratch("train", parameters, ["data/latents/stats.json"]))
    training.publish("data/model", keep_state=True)


if __name__ == "__main__":
    program.run("train", work, __doc__, many_processes=True)
