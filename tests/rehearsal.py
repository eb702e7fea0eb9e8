"""Rehearse the scoring of a published checkpoint at full width: real file names and formats, generated weights.

    python -m tests.rehearsal                  # EAR-B on a CPU; started again, it resumes where it stopped
    python -m tests.rehearsal --classes 1000   # as many as ImageNet has

Each class has one small training image. The commands are those of docs/imagenet.md, with the keys that a CPU needs;
fewer classes than ImageNet's are read as class folders. Prints the minutes of each stage, and why the figures cannot be
compared with published ones.
"""

import argparse
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ear.config.compose import compose
from ear.model import interop
from ear.model.files import build_model
from ear.model.shape import Shape
from ear.runtime.randomness import generator
from tests.published_files import write_inception, write_kl16
from tests.repositories import ROOT, STAGES, environment, fresh

PRESET = "imagenet256_base"
WEIGHTS = {"inception": "pt_inception-2015-12-05-6726825d.pth", "model": "checkpoint-last.pth"}
# As docs/imagenet.md has it; then what a CPU needs, and few images.
CONFIGURE = (
    *(f"preset={PRESET}", f"train.weights=weights/{WEIGHTS['model']}", "train.images=0", "finetune.images=0"),
    f"reference.weights=weights/{WEIGHTS['inception']}",
    *("train.precision=float32", "sample.precision=float32", "runtime.compile=false", "runtime.workers=0"),
    *("data.mirror=false", "cache.batch_size=8", "reference.batch_size=8"),
    *("sample.count=10", "sample.batch_size=10", "sample.steps=8", "evaluate.kid_subset_size=8"),
)
_IMAGENET, _VAL_IMAGES = 1000, 16  # classes; held-out images


def write_images(root: Path, classes: int) -> None:
    """train/WNID/ with one image per class, val/WNID/ with few: smooth noise of 200 x 160 pixels."""
    random = np.random.default_rng(0)
    for number in range(classes + _VAL_IMAGES):
        wnid = f"n{number % classes:08d}"
        part = "train" if number < classes else "val"
        name = f"{wnid}_{number}.JPEG" if part == "train" else f"ILSVRC2012_val_{number - classes + 1:08d}.JPEG"
        small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        content = io.BytesIO()
        small.resize((200, 160), Image.Resampling.BICUBIC).save(content, "JPEG")
        folder = root / part / wnid
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.getvalue())


def write_weights(folder: Path, classes: int) -> None:
    """The four files that a user gets from elsewhere."""
    folder.mkdir()
    write_kl16(folder / "kl16.ckpt")
    write_inception(folder / WEIGHTS["inception"])
    random = np.random.default_rng(0)
    basis = random.standard_normal((2048, 2048)) / 2048**0.5
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", mu=np.full(2048, 0.4), sigma=basis @ basis.T)
    write_checkpoint(folder / WEIGHTS["model"], classes)


def write_checkpoint(path: Path, classes: int) -> None:
    """A model of the preset, with all entries that a training writes; its head is not zero."""
    parameters = compose([f"preset={PRESET}"])
    names = tuple(f"n{number:08d}" for number in range(classes))
    latent = (16, *[parameters.data.image_size // 16] * 2)
    model = build_model(Shape(latent, names, parameters.model, parameters.score.chosen))
    model.initialise(generator(0, "weights"))
    for parameter in model.score.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator(0, "head"))
    named = interop.published_tensors(model)
    more = {"epoch": 799, "scaler": {"scale": 65536.0}, "args": argparse.Namespace(lr=8e-4, output_dir="output")}
    torch.save({"model": named, "model_ema": named, **more}, path)


def prepared(folder: Path, classes: int) -> Path:
    """A clone with images and weights; whatever is there already is kept."""
    if not (folder / ".git").exists():
        fresh(folder)
    if not (folder / "imagenet").exists():
        write_images(folder / "imagenet", classes)
    if not (folder / "weights").exists():
        write_weights(folder / "weights", classes)
    return folder


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.rehearsal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=100, help="default: 100; 1000 are ImageNet's")
    parser.add_argument("--folder", type=Path, help="default: work/rehearsal-CLASSES")
    arguments = parser.parse_args()
    classes = arguments.classes
    folder = prepared((arguments.folder or ROOT / f"work/rehearsal-{classes}").resolve(), classes)
    configure = [*CONFIGURE, *([] if classes == _IMAGENET else ["data.source=folder"])]
    sizes = {path.name: f"{path.stat().st_size / 1e6:,.0f} MB" for path in sorted((folder / "weights").iterdir())}
    print("\n".join(f"weights/{name}: {size}" for name, size in sizes.items()))
    minutes = {}
    commands = [("ear", "configure", *configure, "--force"), ("ear", "describe")]
    for command in [*commands, *(("dvc", "repro", stage) for stage in STAGES)]:
        start = time.monotonic()
        print(f"\n$ {' '.join(command)}", flush=True)
        subprocess.run(command, cwd=folder, env=environment(), check=True)
        minutes[command[-1]] = (time.monotonic() - start) / 60
    figures, protocol = (
        json.loads((folder / f"data/evaluation/{name}.json").read_text()) for name in ("metrics", "protocol")
    )
    print("\nminutes:", ", ".join(f"{stage} {minutes[stage]:.1f}" for stage in STAGES))
    print(f"FID {figures['fid']:.4g}, rFID {figures['reconstruction']['rfid']:.4g}")
    print("not comparable:", "; ".join(protocol["why"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
