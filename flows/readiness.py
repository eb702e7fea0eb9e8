"""Checks before a stage runs and DVC deletes its earlier outputs: input files, links, devices, batch sizes."""

from collections.abc import Iterable

from ear import config
from ear.config.checks import check_shares
from ear.lineage.declaration import declarations
from ear.lineage.run import check_links


def check(parameters: config.Parameters, stages: Iterable[str], keys: Iterable[str] = ()) -> None:
    """Raise UserError now if one of these stages would fail for a reason that is known in advance.

    Reasons: an input file is missing, an output is a link out of the repository, this machine lacks the device or
    precision that the parameters ask for, or processes cannot share the batches evenly.
    keys: further parameters to check against this machine, such as runtime.device.
    """
    from ear.runtime.device import check_can_compute

    stages, declared = set(stages), declarations()
    config.check_files(parameters, stages)
    check_links(path for stage in declared.values() for path in stage.outputs)
    check_can_compute(parameters, {*keys, *(key for name in stages for key in declared[name].parameters)})
    processes, train, tokenizer = parameters.runtime.processes, parameters.train, parameters.tokenizer
    if not stages.isdisjoint({"train", "finetune"}):
        keys = ("train.global_batch_size", "train.micro_batch_size")
        check_shares(train.global_batch_size, train.micro_batch_size, processes, keys)
    if "tokenizer" in stages and tokenizer.name == "kl":
        keys = ("tokenizer.batch_size", "tokenizer.micro_batch_size")
        check_shares(tokenizer.batch_size, tokenizer.micro_batch_size, processes, keys)


def reading(keys: Iterable[str]) -> set[str]:
    """The stages that declare one of these keys of params.yaml, or its section."""
    wanted = {part for key in keys for part in (key, key.partition(".")[0])}
    return {name for name, stage in declarations().items() if not wanted.isdisjoint(stage.parameters)}
