"""What can be known before a stage runs and DVC deletes its earlier outputs: files, links, devices."""

from collections.abc import Iterable

from ear import config
from ear.lineage.declaration import declarations
from ear.lineage.run import check_links


def check(parameters: config.Parameters, keys: Iterable[str]) -> None:
    """Raise UserError with the sentence that a stage would fail with.

    A file that one of `keys` (sections or keys) names is absent, an output is a link out of the repository, or the
    device cannot compute as asked for.
    """
    config.check_files(parameters, set(keys))
    check_links(path for stage in declarations().values() for path in stage.outputs)
    _check_devices(parameters)


def read_by(stages: Iterable[str]) -> set[str]:
    """The sections and keys of params.yaml that stages declare."""
    declared = declarations()
    return {key for name in stages for key in declared[name].parameters}


def _check_devices(parameters: config.Parameters) -> None:
    from ear.runtime import device

    runtime = parameters.runtime
    device.check_devices(runtime.device, runtime.processes)
    trained = ["tokenizer.precision"] if parameters.tokenizer.name == "kl" else []
    for key in (*trained, "train.precision", "sample.precision", "sample.decoder_precision"):
        section, _, name = key.partition(".")
        precision = getattr(getattr(parameters, section), name)
        device.check_precision(precision, device.uses_cuda(runtime.device), key=key)
