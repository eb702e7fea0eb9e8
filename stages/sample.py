"""Generate class-balanced images, one random stream per image, and a picture of them.

Reads data/finetuned and data/tokenizer; writes data/samples/samples.h5 (images uint8 [N, H, W, 3], labels, seed) and
data/samples/grid.png. A killed run resumes with the missing batches and ends in the same bytes.
"""

from dataclasses import dataclass
from pathlib import Path

from ear import config
from ear.data.pictures import grid, save_png
from ear.display.progress import Progress
from ear.files.atomic import link
from ear.files.digests import sha256
from ear.lineage.run import Run
from ear.runtime import distributed
from ear.sampling import drawing, samples
from ear.sampling.generation import ImageSampler, balanced_labels
from ear.sampling.sampler import network_evaluations
from ear.sampling.settings import SamplingSettings
from stages import program

MODEL, TOKENIZER = Path("data/finetuned/model.safetensors"), Path("data/tokenizer/tokenizer.safetensors")
_GRID = 100  # images in the picture


@dataclass(frozen=True)
class Parameters:
    """What the stage depends on."""

    compute: config.Compute
    sample: config.Sample
    runtime: config.Runtime


def work(parameters: Parameters, run: Run) -> None:
    """Draw, decode, store."""
    options, runtime, threads = parameters.sample, parameters.runtime, parameters.compute.threads
    settings = SamplingSettings.of(options)
    setup = drawing.Setup(MODEL, TOKENIZER, settings, runtime.device, threads, runtime.compile)
    sampler = setup.open()
    classes = sampler.model.shape.classes
    labels = balanced_labels(options.count, len(classes))
    file = run.scratch(program.plain(parameters), [MODEL, TOKENIZER]) / "samples.h5"
    left = distributed.from_main(lambda: begin(file, sampler, labels, options))
    done = len(labels) - sum(len(part) for _, part in left)
    counts = drawing.draw(left, file, sampler=sampler, setup=setup, cluster=runtime.cluster)
    with Progress("sampling", len(labels), start=done) as progress:
        for count in counts:
            progress.advance(count)
    if distributed.is_main():
        publish(file, run.output("data/samples"), columns=min(len(classes), 10))


def begin(file: Path, sampler: ImageSampler, labels: list[int], options: config.Sample) -> list[drawing.Batch]:
    """Create the file if it is new => the batches it lacks."""
    if not file.is_file():
        drawing.forget(file)
        sources = {"model_sha256": sha256(MODEL), "tokenizer_sha256": sha256(TOKENIZER)}
        model = sampler.model
        costs = {"evaluations_per_image": network_evaluations(model, SamplingSettings.of(options))}
        sampling = {**options.model_dump(), **costs, "classes": list(model.shape.classes), **sources}
        samples.create(file, labels=labels, image_shape=sampler.image_shape, sampling=sampling)
    return drawing.missing(file, labels, options.batch_size)


def publish(file: Path, folder: Path, columns: int) -> None:
    """Link the finished file into `folder` and draw the grid."""
    folder.mkdir()
    link(file, folder / "samples.h5")
    made = samples.GeneratedImages(file)
    save_png(folder / "grid.png", grid(made.images(range(min(_GRID, len(made)))), columns))


if __name__ == "__main__":
    program.run("sample", work, Parameters, __doc__, many_processes=True)
