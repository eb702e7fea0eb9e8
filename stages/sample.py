"""Generate class-balanced images, one random stream per image, and a picture of them.

Reads data/finetuned and data/tokenizer; writes data/samples/samples.h5 (images uint8 [N, H, W, 3], labels, seed) and
data/samples/grid.png. A killed run goes on with the batches that are missing and ends in the same bytes.
"""

from dataclasses import asdict
from pathlib import Path

from ear import device as devices
from ear import distributed, records, samples
from ear.generation import Generator, balanced_labels
from ear.pictures import grid, save_png
from ear.progress import Progress
from ear.sampling import network_evaluations
from stages import program

MODEL, TOKENIZER = "data/finetuned/model.safetensors", "data/tokenizer/tokenizer.safetensors"
_GRID = 100  # images in the picture


def work(parameters) -> None:
    """Draw, decode, store."""
    options = parameters.sample
    device = devices.prepare(parameters.runtime.device, parameters.compute.threads)
    devices.set_precision(options.precision, device, key="sample.precision")
    generator = Generator.open(MODEL, TOKENIZER, device)
    if parameters.runtime.compile and device.type == "cuda":
        devices.compile_in_place(generator.model.transformer)
    classes = generator.model.shape.classes
    labels = balanced_labels(options.count, len(classes))
    file = program.scratch("sample", parameters, [MODEL, TOKENIZER]) / "samples.h5"
    missing = distributed.from_main(lambda: begin(file, generator, labels, options))
    draw(generator, labels, missing, options, file)
    if distributed.is_main():
        publish(file, columns=min(len(classes), 10))


def begin(file: Path, generator: Generator, labels: list[int], options) -> list[int]:
    """Numbers of the first images of the batches that are missing in the file, which is laid out if it is new."""
    if not file.is_file():
        sources = {"model_sha256": records.sha256(MODEL), "tokenizer_sha256": records.sha256(TOKENIZER)}
        model = generator.model
        costs = {"evaluations_per_image": network_evaluations(model, options.steps)}
        sampling = {**asdict(options), **costs, "classes": list(model.shape.classes), **sources}
        samples.create(file, labels=labels, image_shape=generator.image_shape, sampling=sampling)
    return [first for first in range(0, len(labels), options.batch_size) if not finished(file, first).exists()]


def finished(file: Path, first: int) -> Path:
    """The empty file that marks a batch as finished."""
    return file.with_name(f"finished-{first:09d}")


def draw(generator: Generator, labels: list[int], missing: list[int], options, file: Path) -> None:
    """Fill the file batch by batch, each process every so-manieth of them."""
    names = ("steps", "guidance", "schedule", "temperature", "seed", "precision")
    settings = {name: getattr(options, name) for name in names}

    def batch(first: int) -> int:
        images = generator.images(labels[first : first + options.batch_size], first=first, **settings)
        samples.write(file, first, images)
        finished(file, first).touch()
        return len(images)

    left = sum(len(labels[first : first + options.batch_size]) for first in missing)
    with Progress("sampling", len(labels), start=len(labels) - left) as progress:
        for count in distributed.in_turns(missing, batch):
            progress.advance(count)


def publish(file: Path, columns: int) -> None:
    """Put the finished file in its place and draw the grid."""
    with records.whole_folder("data/samples") as folder:
        records.link(file, folder / "samples.h5")
        made = samples.GeneratedImages(folder / "samples.h5")
        save_png(folder / "grid.png", grid(made.images(range(min(_GRID, len(made)))), columns))


if __name__ == "__main__":
    program.run("sample", work, __doc__, many_processes=True)
