"""A stage's work in this process and the current folder, with some of the default parameters changed."""

import copy
import functools
import importlib
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ear import config
from stages import program

_DEFAULT = Path(__file__).parent.parent / "params.yaml"


def parameters(changes: Mapping[str, object]) -> config.Parameters:
    """The default ones with {"section.key": value} changed."""
    content = copy.deepcopy(_default())
    for key, value in changes.items():
        OmegaConf.update(content, key, value)
    return config.parse(OmegaConf.to_container(content))


@functools.cache
def _default() -> DictConfig:
    return OmegaConf.load(_DEFAULT)


def main(stage: str) -> int:
    """The stage as a program, but in this process, with the params.yaml of the current folder => its exit code."""
    arguments, sys.argv = sys.argv, [stage]
    try:
        runpy.run_path(str(_DEFAULT.parent / f"stages/{stage}.py"), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = arguments
    return 0


def run(stage: str, changes: Mapping[str, object]) -> None:
    """The stage, which sees the parameters that it declares, and publishes what it made."""
    module, found = importlib.import_module(f"stages.{stage}"), parameters(changes)
    program.perform(stage, module.work, module.Parameters, lambda: found)
