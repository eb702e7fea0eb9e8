"""Encode every image and its mirror image into posterior moments.

Reads data/prepared and data/tokenizer; writes data/latents: {train,val}-IIIII-of-NNNNN.h5 and stats.json. A killed run
resumes with the missing pieces and ends in the same bytes.
"""

from dataclasses import dataclass
from pathlib import Path

from ear import config
from ear.files.digests import sha256
from ear.files.json_files import read_json
from ear.latents import caching
from ear.lineage.run import Run
from ear.runtime import distributed
from ear.runtime.device import prepare_device
from ear.tokenizer.autoencoder import load_tokenizer
from stages import program

TOKENIZER = Path("data/tokenizer/tokenizer.safetensors")
PREPARED = Path("data/prepared")


@dataclass(frozen=True)
class Parameters:
    """What the stage depends on."""

    cache: config.Cache
    compute: config.Compute
    runtime: config.Runtime


def work(parameters: Parameters, run: Run) -> None:
    """Encode both splits."""
    device = prepare_device(parameters.runtime.device, parameters.compute.threads)
    encoder = caching.Encoder(
        load_tokenizer(TOKENIZER).to(device),
        fingerprint=sha256(TOKENIZER),
        batch_size=parameters.cache.batch_size,
        device=device,
    )
    scratch = run.scratch(program.plain(parameters), [TOKENIZER, PREPARED / "index.json"])
    address = parameters.runtime.cluster
    cluster = caching.Cluster(address, TOKENIZER, parameters.compute.threads) if address else None
    target = run.output("data/latents")
    limit = parameters.cache.noise_limit
    caching.cache(PREPARED, target, encoder=encoder, scratch=scratch, cluster=cluster, noise_limit=limit)
    if distributed.is_main():
        run.computed("data/latents", read_json(target / "stats.json")["shards"])


if __name__ == "__main__":
    program.run("cache", work, Parameters, __doc__, many_processes=True)
