"""Generate class-balanced images, one random stream per image, and a picture of them.

Reads data/finetuned and data/tokenizer; writes data/samples/samples.h5 (images uint8 [N, H, W, 3], labels, seed) and
data/samples/grid.png. A killed run goes on with the batches that are missing and ends in the same bytes.
"""

from dataclasses import asdict
from pathlib import Path

from ear import distributed, drawing, records, samples
from ear.generation import Generator, balanced_labels
from ear.pictures import grid, save_png
from ear.progress import Progress
from ear.sampling import network_evaluations
from stages import program

MODEL, TOKENIZER = Path("data/finetuned/model.safetensors"), Path("data/tokenizer/tokenizer.safetensors")
_GRID = 100  # images in the picture


def work(parameters) -> None:
    """Draw, decode, store."""
    options, runtime, threads = parameters.sample, parameters.runtime, parameters.compute.threads
    setup = drawing.Setup(MODEL, TOKENIZER, runtime.device, threads, options.precision, runtime.compile)
    generator = setup.open()
    classes = generator.model.shape.classes
    labels = balanced_labels(options.count, len(classes))
    file = program.scratch("sample", parameters, [MODEL, TOKENIZER]) / "samples.h5"
    left = distributed.from_main(lambda: begin(file, generator, labels, options))
    names = ("steps", "guidance", "schedule", "temperature", "seed", "precision")
    settings = {name: getattr(options, name) for name in names}
    done = len(labels) - sum(len(part) for _, part in left)
    counts = drawing.draw(left, file, generator=generator, setup=setup, settings=settings, cluster=runtime.cluster)
    with Progress("sampling", len(labels), start=done) as progress:
        for count in counts:
            progress.advance(count)
    if distributed.is_main():
        publish(file, columns=min(len(classes), 10))


def begin(file: Path, generator: Generator, labels: list[int], options) -> list[drawing.Batch]:
    """The batches that are missing in the file, which is laid out if it is new."""
    if not file.is_file():
        sources = {"model_sha256": records.sha256(MODEL), "tokenizer_sha256": records.sha256(TOKENIZER)}
        model = generator.model
        costs = {"evaluations_per_image": network_evaluations(model, options.steps)}
        sampling = {**asdict(options), **costs, "classes": list(model.shape.classes), **sources}
        samples.create(file, labels=labels, image_shape=generator.image_shape, sampling=sampling)
    return drawing.missing(file, labels, options.batch_size)


def publish(file: Path, columns: int) -> None:
    """Put the finished file in its place and draw the grid."""
    with records.whole_folder("data/samples") as folder:
        records.link(file, folder / "samples.h5")
        made = samples.GeneratedImages(folder / "samples.h5")
        save_png(folder / "grid.png", grid(made.images(range(min(_GRID, len(made)))), columns))


if __name__ == "__main__":
    program.run("sample", work, __doc__, many_processes=True)
