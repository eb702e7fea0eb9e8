"""Train the autoencoder between images and latents, import one, or write down the identity.

Reads data/prepared; writes data/tokenizer: tokenizer.safetensors (averaged weights), metrics.json on held-out images,
the logs and reconstructions.png (held-out images in pairs of rows, originals above reconstructions). A killed training
goes on from its last checkpoint and ends in the same bytes. DVC tracks the name of a file to import, not its content.
"""

import torch

from ear import device as devices
from ear import pictures, randomness, records
from ear.autoencoder import Identity, Tokenizer, kl_structure, new_kl, save_tokenizer
from ear.autoencoder_import import import_tokenizer
from ear.autoencoder_loss import AutoencoderLoss
from ear.autoencoder_training import AutoencoderTraining, Objective
from ear.perceptual import load_perceptual
from ear.prepared import PreparedImages
from ear.reconstruction import describe, reconstruct
from ear.training import History, write_table
from stages import program

_PAIRS, _COLUMNS = 3, 12  # pairs of rows and columns of the picture


def work(parameters) -> None:
    """Train (kl) or take what is ready-made, describe, publish."""
    device = devices.prepare(parameters.runtime.device, parameters.compute.threads)
    images, held_out = (PreparedImages("data/prepared", split) for split in ("train", "val"))
    size, options = parameters.data.image_size, parameters.tokenizer
    if images.image_size != size:
        raise ValueError(
            f"the images of data/prepared have {images.image_size} pixels a side, but data.image_size is {size}; run "
            "the prepare stage again."
        )
    if options.name == "kl":
        folder = program.scratch("tokenizer", parameters, ["data/prepared/index.json"])
        tokenizer, history = train(images, held_out, options, device).run(folder)
        source = None
    else:
        tokenizer, source = ready_made(options, size)
        objective = Objective(AutoencoderLoss(options.kl_weight), seed=options.seed, device=device)
        figures = objective.held_out(tokenizer.to(device), held_out, options.batch_size)
        history = History([{"images": 0, **figures}], [{"images": 0, **figures}])
    publish(tokenizer.to(device).eval(), source, history, held_out, options, device)


def train(images: PreparedImages, held_out: PreparedImages, options, device: torch.device) -> AutoencoderTraining:
    """The training that the parameters ask for, from new weights."""
    perceptual = load_perceptual(options.perceptual_folder).to(device) if options.perceptual_weight else None
    loss = AutoencoderLoss(options.kl_weight, perceptual, options.perceptual_weight)
    objective = Objective(loss, seed=randomness.derive(options.seed, "tokenizer"), device=device)
    structure = kl_structure(channels=options.channels, block_channels=options.block_channels, layers=options.layers)
    seed = randomness.derive(objective.seed, "weights")
    return AutoencoderTraining(
        new_kl(seed=seed, image_size=images.image_size, structure=structure),
        images=images,
        held_out=held_out,
        objective=objective,
        total_images=options.images,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        learning_rate=options.learning_rate,
        ema_decay=options.ema_decay,
        adversarial_weight=options.adversarial_weight,
        adversarial_start=options.adversarial_start,
    )


def ready_made(options, size: int) -> tuple[Tokenizer, dict | None]:
    """A tokenizer that needs no training, and where its weights come from."""
    if options.name == "identity":
        return Identity(image_size=size, downsample=options.downsample), None
    expected = {"downsample": options.downsample, "channels": options.channels}
    imported = import_tokenizer(options.weights, kind=options.name, image_size=size, **expected)
    return imported.tokenizer, imported.source


def publish(
    tokenizer: Tokenizer, source: dict | None, history: History, images: PreparedImages, options, device
) -> None:
    """Describe the tokenizer, which is on the device, by held-out images, and write the outputs."""
    batches = (torch.from_numpy(batch).to(device) for batch, _ in images.batches(options.batch_size))
    figures = describe(tokenizer, batches, randomness.generator(options.seed, "tokenizer", "description"))
    figures["parameters"] = sum(p.numel() for p in tokenizer.parameters())
    columns = min(_COLUMNS, len(images))
    originals = images.images(range(min(_PAIRS, len(images) // columns) * columns))
    others = reconstruct(tokenizer, torch.from_numpy(originals).to(device)).cpu().numpy()
    with records.whole_folder("data/tokenizer") as folder:
        save_tokenizer(folder / "tokenizer.safetensors", tokenizer, source)
        write_table(folder / "training.tsv", history.training)
        write_table(folder / "validation.tsv", history.validation)
        pictures.save_png(folder / "reconstructions.png", pictures.pairs(originals, others, columns))
        records.write_json(folder / "metrics.json", records.rounded(figures))
    print(f"PSNR of held-out images: {figures['psnr']:.2f} dB, through a sample {figures['psnr_sampled']:.2f} dB")


if __name__ == "__main__":
    program.run("tokenizer", work, __doc__)
