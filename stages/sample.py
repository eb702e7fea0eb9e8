"""Generate class-balanced images, one random stream per image, and a picture of them.

Reads data/finetuned and data/tokenizer; writes data/samples/samples.h5 (images uint8 [N, H, W, 3], labels, seed) and
data/samples/grid.png. A killed run goes on after its last finished batch and ends in the same bytes.
"""

import json
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np

from ear import device as devices
from ear import records
from ear.generation import Generator, balanced_labels, batches
from ear.pictures import grid, save_png
from ear.progress import Progress
from stages import program

MODEL, TOKENIZER = "data/finetuned/model.safetensors", "data/tokenizer/tokenizer.safetensors"
FORMAT = "ear-samples-1"
_GRID = 100  # images in the picture


def work(parameters) -> None:
    """Draw, decode, store."""
    options = parameters.sample
    device = devices.prepare(parameters.runtime.device, parameters.compute.threads)
    generator = Generator.open(MODEL, TOKENIZER, device)
    labels = balanced_labels(options.count, len(generator.model.shape.classes))
    folder = program.scratch("sample", parameters, [MODEL, TOKENIZER])
    draw = {name: getattr(options, name) for name in ("steps", "guidance", "schedule", "temperature", "seed")}
    with Progress("sampling", len(labels)) as progress:
        for first, part in batches(labels, options.batch_size):
            finished = folder / f"images-{first:09d}.npy"
            if not finished.is_file():
                images = generator.images(part, first=first, **draw)
                with records.whole_file(finished) as partial, partial.open("wb") as file:
                    np.save(file, images)
            progress.advance(len(part))
    description = {
        **asdict(options),
        "classes": list(generator.model.shape.classes),
        "model_sha256": records.sha256(MODEL),
        "tokenizer_sha256": records.sha256(TOKENIZER),
    }
    publish(sorted(folder.glob("images-*.npy")), labels, description)


def publish(parts: list[Path], labels: list[int], description: dict) -> None:
    """Gather the finished batches into samples.h5 and draw the grid."""
    with records.whole_folder("data/samples") as folder:
        write_samples(folder / "samples.h5", parts, labels, description)
        columns = min(len(description["classes"]), 10)
        with h5py.File(folder / "samples.h5") as file:
            save_png(folder / "grid.png", grid(file["images"][:_GRID], columns=columns))


def write_samples(path: Path, parts: list[Path], labels: list[int], description: dict) -> None:
    """One HDF5 file from the batches, which are never all in memory."""
    with h5py.File(path, "w", libver="latest") as file:
        shape = (len(labels), *np.load(parts[0], mmap_mode="r").shape[1:])
        images = file.create_dataset("images", shape=shape, dtype="uint8")
        start = 0
        for part in parts:
            batch = np.load(part)
            images[start : start + len(batch)] = batch
            start += len(batch)
        assert start == len(labels)
        file["labels"] = np.asarray(labels, dtype="int32")
        file["seed"] = np.int64(description["seed"])
        file.attrs["format"] = FORMAT
        file.attrs["sampling"] = json.dumps(description, sort_keys=True)


if __name__ == "__main__":
    program.run("sample", work, __doc__)
