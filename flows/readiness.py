"""What can be known before a stage runs and DVC deletes its earlier outputs: files, links, devices."""

from collections.abc import Iterable

from ear import config
from ear.lineage.declaration import declarations
from ear.lineage.run import check_links


def check(parameters: config.Parameters, keys: Iterable[str]) -> None:
    """Raise UserError with the sentence that a stage would fail with.

    A file that one of `keys` (sections or keys) names is absent, an output is a link out of the repository, or this
    machine cannot compute as the keys ask for.
    """
    from ear.runtime.device import check_can_compute

    keys = set(keys)
    config.check_files(parameters, keys)
    check_links(path for stage in declarations().values() for path in stage.outputs)
    check_can_compute(parameters, keys)


def read_by(stages: Iterable[str]) -> set[str]:
    """The sections and keys of params.yaml that stages declare."""
    declared = declarations()
    return {key for name in stages for key in declared[name].parameters}
