"""Decode the listed images, cut out their centres and store them with their labels in HDF5 shards.

Reads data/raw; writes data/prepared: {train,val}-IIIII-of-NNNNN.h5, classes.json, rejected.csv and index.json. A killed
run goes on with the shards that are missing and ends in the same bytes.
"""

from pathlib import Path
from types import SimpleNamespace

from ear import manifest, preparation
from stages import program


def work(parameters) -> None:
    """Every image of the manifest."""
    options, size = parameters.prepare, parameters.data.image_size
    # Neither max_rejected nor the manifest: what was finished before a repair, or before more is allowed, stays good.
    layout = SimpleNamespace(shard_size=options.shard_size, compression=options.compression)
    scratch = program.scratch("prepare", SimpleNamespace(image=SimpleNamespace(size=size), prepare=layout))
    preparation.prepare(
        manifest.read_manifest("data/raw"),
        scratch=scratch,
        target=Path("data/prepared"),
        rejected_list=program.LOGS / "prepare-rejected.csv",
        image_size=size,
        shard_size=options.shard_size,
        compression=options.compression,
        max_rejected=options.max_rejected,
        workers=parameters.runtime.workers,
        cluster=parameters.runtime.cluster,
    )


if __name__ == "__main__":
    program.run("prepare", work, __doc__)
