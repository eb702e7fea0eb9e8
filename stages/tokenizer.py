"""Train the autoencoder between images and latents, import one, fit principal components, or use the identity.

Reads data/prepared; writes data/tokenizer: tokenizer.safetensors (EMA weights), metrics.json for held-out images, logs,
and reconstructions.png (held-out images above their reconstructions). A killed training resumes and, on CPUs, ends in
the same bytes. DVC tracks the name of an imported file, not its content.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from ear import config
from ear.data import pictures
from ear.data.prepared import PreparedImages
from ear.errors import UserError
from ear.files.json_files import rounded, write_json
from ear.files.tables import write_table
from ear.lineage.run import Run
from ear.runtime import distributed, randomness
from ear.runtime.device import check_precision, prepare_device
from ear.tokenizer import perceptual
from ear.tokenizer.autoencoder import Identity, Tokenizer, kl_structure, new_kl, save_tokenizer
from ear.tokenizer.components import fit_pca
from ear.tokenizer.importing import import_tokenizer
from ear.tokenizer.loss import AutoencoderLoss
from ear.tokenizer.reconstruction import describe, reconstruct
from ear.tokenizer.training import AutoencoderTraining, Objective
from ear.training.trainer import History
from stages import program

_PAIRS, _COLUMNS = 3, 12  # pairs of rows and columns of the picture


@dataclass(frozen=True)
class Parameters:
    """What the stage depends on."""

    image_size: Annotated[int, "data.image_size"]
    compute: config.Compute
    tokenizer: config.Tokenizer
    runtime: config.Runtime


def work(parameters: Parameters, run: Run) -> None:
    """Train (kl) or import a tokenizer, describe it, publish it."""
    device = prepare_device(parameters.runtime.device, parameters.compute.threads)
    held_out = PreparedImages("data/prepared", "val")
    size, options = parameters.image_size, parameters.tokenizer
    if held_out.image_size != size:
        raise UserError(
            f"the images of data/prepared have {held_out.image_size} pixels a side, but data.image_size is {size}; run "
            "the prepare stage again."
        )
    tokenizer: Tokenizer
    if options.name == "kl":
        check_precision(options.precision, device.type == "cuda", key="tokenizer.precision")
        judges = perceptual.files(options.perceptual_folder) if options.perceptual_weight else ()
        scratch = run.scratch(program.plain(parameters), ["data/prepared/index.json", *judges])
        training = train(PreparedImages("data/prepared", "train"), held_out, options, device)
        tokenizer, history = training.run(scratch, program.live("tokenizer", parameters, scratch))
    else:
        tokenizer = ready_made(options, size)
        objective = Objective(AutoencoderLoss(options.kl_weight), seed=options.seed, device=device)
        figures = objective.held_out(tokenizer.to(device), held_out, options.batch_size)
        history = History([{"images": 0, **figures}], [{"images": 0, **figures}])  # both of held-out images
    if distributed.is_main():
        publish(run.output("data/tokenizer"), tokenizer.to(device).eval(), history, held_out, options, device)


def train(
    images: PreparedImages, held_out: PreparedImages, options: config.Tokenizer, device: torch.device
) -> AutoencoderTraining:
    """The training with these parameters, from new weights."""
    judge = perceptual.load_perceptual(options.perceptual_folder).to(device) if options.perceptual_weight else None
    loss = AutoencoderLoss(options.kl_weight, judge, options.perceptual_weight)
    seed = randomness.derive(options.seed, "tokenizer")
    objective = Objective(loss, seed=seed, device=device, precision=options.precision)
    structure = kl_structure(channels=options.channels, block_channels=options.block_channels, layers=options.layers)
    tokenizer = new_kl(seed=randomness.derive(seed, "weights"), image_size=images.image_size, structure=structure)
    return AutoencoderTraining(tokenizer, options, images=images, held_out=held_out, objective=objective)


def ready_made(options: config.Tokenizer, size: int) -> Tokenizer:
    """A tokenizer that needs no training: imported, fitted in closed form, or the identity."""
    if options.name == "pca":
        images = PreparedImages("data/prepared", "train")
        return fit_pca(images, downsample=options.downsample, channels=options.channels, whitening=options.whitening)
    if options.name == "identity":
        return Identity(image_size=size, downsample=options.downsample)
    return import_tokenizer(options, image_size=size)


def unread(parameters: Parameters) -> str:
    """The files of the training images, unless the tokenizer is made from them."""
    return "" if parameters.tokenizer.name in ("kl", "pca") else program.TRAINING_IMAGES


def publish(folder: Path, tokenizer: Tokenizer, history: History, images: PreparedImages, options, device) -> None:
    """Describe the tokenizer (on the device) on held-out images, and write the outputs into `folder`."""
    batches = (torch.from_numpy(batch).to(device) for batch, _ in images.batches(options.batch_size))
    figures, channels = describe(tokenizer, batches, randomness.stream(options.seed, "tokenizer", "description"))
    figures["parameters"] = sum(p.numel() for p in tokenizer.parameters())
    columns = min(_COLUMNS, len(images))
    originals = images.images(range(min(_PAIRS, len(images) // columns) * columns))
    others = reconstruct(tokenizer, torch.from_numpy(originals).to(device)).cpu().numpy()
    folder.mkdir()
    save_tokenizer(folder / "tokenizer.safetensors", tokenizer)
    write_table(folder / "training.tsv", history.training)
    write_table(folder / "validation.tsv", history.validation)
    write_table(folder / "channels.tsv", channels)
    pictures.save_png(folder / "reconstructions.png", pictures.pairs(originals, others, columns))
    write_json(folder / "metrics.json", rounded(figures))
    print(f"PSNR of held-out images: {figures['psnr']:.2f} dB, through a sample {figures['psnr_sampled']:.2f} dB")


if __name__ == "__main__":
    program.run("tokenizer", work, Parameters, __doc__, unread=unread, many_processes=True)
