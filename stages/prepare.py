"""Decode the listed images, cut out their centres and store them with their labels in HDF5 shards.

Reads data/raw; writes data/prepared: {train,val}-IIIII-of-NNNNN.h5, classes.json, rejected.csv and index.json. A killed
run resumes with the missing shards and ends in the same bytes.
"""

from dataclasses import dataclass
from typing import Annotated

from ear import config
from ear.data import manifest, preparation
from ear.files.json_files import read_json
from ear.lineage.run import Run
from stages import program


@dataclass(frozen=True)
class Parameters:
    """What the stage depends on."""

    image_size: Annotated[int, "data.image_size"]
    prepare: config.Prepare
    runtime: config.Runtime


def work(parameters: Parameters, run: Run) -> None:
    """Prepare every image of the manifest."""
    options = parameters.prepare
    layout = preparation.Layout(parameters.image_size, options.shard_size, options.compression)
    images = manifest.read_manifest("data/raw")
    # The key has neither max_rejected nor the list of images: shards finished before images were repaired, or before
    # more were allowed to be unreadable, stay valid.
    scratch = run.scratch({"layout": program.plain(layout), "root": str(images.root)})
    target = run.output("data/prepared")
    preparation.prepare(
        images,
        scratch=scratch,
        target=target,
        rejected_list=program.LOGS / "prepare-rejected.csv",
        layout=layout,
        max_rejected=options.max_rejected,
        workers=parameters.runtime.workers,
        cluster=parameters.runtime.cluster,
    )
    run.computed("data/prepared", read_json(target / "index.json")["shards"])


if __name__ == "__main__":
    program.run("prepare", work, Parameters, __doc__)
