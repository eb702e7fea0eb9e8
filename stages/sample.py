"""Generate class-balanced images, one random stream per image, and a picture of them.

Reads data/finetuned and data/tokenizer; writes data/samples/samples.h5 (images uint8 [N, H, W, 3], labels, seed) and
data/samples/grid.png. A killed run goes on with the batches that are missing and ends in the same bytes.
"""

from dataclasses import asdict
from pathlib import Path

from ear import device as devices
from ear import records, samples
from ear.generation import Generator, balanced_labels, batches
from ear.pictures import grid, save_png
from ear.progress import Progress
from stages import program

MODEL, TOKENIZER = "data/finetuned/model.safetensors", "data/tokenizer/tokenizer.safetensors"
_GRID = 100  # images in the picture


def work(parameters) -> None:
    """Draw, decode, store."""
    options = parameters.sample
    device = devices.prepare(parameters.runtime.device, parameters.compute.threads)
    generator = Generator.open(MODEL, TOKENIZER, device)
    classes = generator.model.shape.classes
    labels = balanced_labels(options.count, len(classes))
    folder = program.scratch("sample", parameters, [MODEL, TOKENIZER])
    file = folder / "samples.h5"
    if not file.is_file():
        sources = {"model_sha256": records.sha256(MODEL), "tokenizer_sha256": records.sha256(TOKENIZER)}
        sampling = {**asdict(options), "classes": list(classes), **sources}
        samples.create(file, labels=labels, image_shape=generator.image_shape, sampling=sampling)
    draw(generator, labels, options, file)
    publish(file, columns=min(len(classes), 10))


def draw(generator: Generator, labels: list[int], options, file: Path) -> None:
    """Fill the file batch by batch; an empty file beside it marks each one that is finished."""
    settings = {name: getattr(options, name) for name in ("steps", "guidance", "schedule", "temperature", "seed")}
    with Progress("sampling", len(labels)) as progress:
        for first, part in batches(labels, options.batch_size):
            finished = file.with_name(f"finished-{first:09d}")
            if not finished.exists():
                samples.write(file, first, generator.images(part, first=first, **settings))
                finished.touch()
            progress.advance(len(part))


def publish(file: Path, columns: int) -> None:
    """Put the finished file in its place and draw the grid."""
    with records.whole_folder("data/samples") as folder:
        records.link(file, folder / "samples.h5")
        made = samples.GeneratedImages(folder / "samples.h5")
        save_png(folder / "grid.png", grid(made.images(range(min(_GRID, len(made)))), columns=columns))


if __name__ == "__main__":
    program.run("sample", work, __doc__)
