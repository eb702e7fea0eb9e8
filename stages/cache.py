"""Encode every image and its mirror image into posterior moments.

Reads data/prepared and data/tokenizer; writes data/latents: {train,val}-IIIII-of-NNNNN.h5 and stats.json. A killed run
goes on with the shards that are missing and ends in the same bytes.
"""

from pathlib import Path

from ear import caching, records
from ear import device as devices
from ear.autoencoder import load_tokenizer
from stages import program

TOKENIZER = Path("data/tokenizer/tokenizer.safetensors")
PREPARED = Path("data/prepared")


def work(parameters) -> None:
    """Both splits."""
    device = devices.prepare(parameters.runtime.device, parameters.compute.threads)
    encoder = caching.Encoder(
        load_tokenizer(TOKENIZER).to(device),
        fingerprint=records.sha256(TOKENIZER),
        batch_size=parameters.cache.batch_size,
        device=device,
    )
    scratch = program.scratch("cache", parameters, [TOKENIZER, PREPARED / "index.json"])
    address = parameters.runtime.cluster
    cluster = caching.Cluster(address, TOKENIZER, parameters.compute.threads) if address else None
    caching.cache(PREPARED, Path("data/latents"), encoder=encoder, scratch=scratch, cluster=cluster)


if __name__ == "__main__":
    program.run("cache", work, __doc__, many_processes=True)
