"""Train the autoregressive transformer on cached latents by maximising the selected score.

Reads data/latents and, where train.weights names one, a published checkpoint to start from (DVC does not watch that
file); writes data/model: averaged weights, the whole training state, logs and metrics. A killed run goes on from its
last checkpoint and ends in the same bytes.
"""

from dataclasses import asdict

from ear import interop, randomness, scores
from ear import model as models
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
    if options.weights:
        interop.load_into(model, options.weights)
    else:
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
        statistics=interop.published_statistics(store.shape[0]) if options.weights else None,
    )
    inputs = ["data/latents/stats.json", *([options.weights] if options.weights else [])]
    training.run(program.scratch("train", parameters, inputs))
    training.publish("data/model", keep_state=True)


if __name__ == "__main__":
    program.run("train", work, __doc__, many_processes=True)
