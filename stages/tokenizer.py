"""Train the autoencoder between images and latents, or write down the identity.

Reads data/prepared; writes data/tokenizer: tokenizer.safetensors (averaged weights), metrics.json on held-out images,
the logs and reconstructions.png (held-out images in pairs of rows, originals above reconstructions). A killed training
goes on from its last checkpoint and ends in the same bytes.
"""

import numpy as np
import torch

from ear import device as devices
from ear import pictures, randomness, records
from ear.autoencoder import Identity, Tokenizer, new_kl, save_tokenizer
from ear.autoencoder_loss import describe, reconstruct
from ear.autoencoder_training import AutoencoderTraining
from ear.prepared import PreparedImages
from ear.training import History, write_table
from stages import program

_ROWS, _COLUMNS = 3, 12  # pairs of rows and columns of the picture


def work(parameters) -> None:
    """Train (kl only), describe, publish."""
    device = devices.prepare(parameters.runtime.device, parameters.compute.threads)
    images, held_out = (PreparedImages("data/prepared", split) for split in ("train", "val"))
    size, options = parameters.data.image_size, parameters.tokenizer
    if images.image_size != size:
        raise ValueError(
            f"the images of data/prepared have {images.image_size} pixels a side, but data.image_size is {size}; run "
            "the prepare stage again."
        )
    if options.name == "identity":
        tokenizer = Identity(image_size=size, downsample=options.downsample)
        exact = {"images": 0, "loss": 0.0, "reconstruction": 0.0}
        history = History([exact], [exact])
    else:
        folder = program.scratch("tokenizer", parameters, ["data/prepared/index.json"])
        tokenizer, history = train(images, held_out, options, device).run(folder)
    publish(tokenizer.to(device).eval(), history, held_out, options, device)


def train(images: PreparedImages, held_out: PreparedImages, options, device: torch.device) -> AutoencoderTraining:
    """The training that the parameters ask for, from new weights."""
    seed = randomness.derive(options.seed, "tokenizer")
    tokenizer = new_kl(
        seed=randomness.derive(seed, "weights"),
        image_size=images.image_size,
        channels=options.channels,
        block_channels=options.block_channels,
        layers=options.layers,
    )
    return AutoencoderTraining(
        tokenizer,
        images=images,
        held_out=held_out,
        kl_weight=options.kl_weight,
        total_images=options.images,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        ema_decay=options.ema_decay,
        seed=seed,
        device=device,
    )


def publish(tokenizer: Tokenizer, history: History, held_out: PreparedImages, options, device: torch.device) -> None:
    """Write the outputs."""
    batches = (torch.from_numpy(images).to(device) for images, _ in held_out.batches(options.batch_size))
    figures = describe(tokenizer, batches, randomness.generator(options.seed, "tokenizer", "description"))
    figures["parameters"] = sum(p.numel() for p in tokenizer.parameters())
    with records.whole_folder("data/tokenizer") as folder:
        save_tokenizer(folder / "tokenizer.safetensors", tokenizer)
        write_table(folder / "training.tsv", history.training)
        write_table(folder / "validation.tsv", history.validation)
        pictures.save_png(folder / "reconstructions.png", comparison(tokenizer, held_out, device))
        records.write_json(folder / "metrics.json", records.rounded(figures))
    print(f"PSNR of held-out images: {figures['psnr']:.2f} dB, through a sample {figures['psnr_sampled']:.2f} dB")


def comparison(tokenizer: Tokenizer, held_out: PreparedImages, device: torch.device) -> np.ndarray:
    """Pairs of rows of the first held-out images, originals above reconstructions."""
    columns = min(_COLUMNS, len(held_out))
    originals = held_out.images(range(min(_ROWS, len(held_out) // columns) * columns))
    others = reconstruct(tokenizer, torch.from_numpy(originals).to(device)).cpu().numpy()
    starts = range(0, len(originals), columns)
    cells = np.concatenate([part[k : k + columns] for k in starts for part in (originals, others)])
    return pictures.grid(cells, columns, pictures.readable_scale(held_out.image_size))


if __name__ == "__main__":
    program.run("tokenizer", work, __doc__)
