"""A stage's work in this process and the current folder, with some of the default parameters changed."""

import importlib
from collections.abc import Mapping
from pathlib import Path

from omegaconf import OmegaConf

from ear import config
from stages import program

_DEFAULT = Path(__file__).parent.parent / "params.yaml"


def parameters(changes: Mapping[str, object]) -> config.Parameters:
    """The default ones with {"section.key": value} changed."""
    content = OmegaConf.load(_DEFAULT)
    for key, value in changes.items():
        OmegaConf.update(content, key, value)
    return config.parse(OmegaConf.to_container(content))


def run(stage: str, changes: Mapping[str, object]) -> None:
    """The stage, which sees the parameters that it declares, and publishes what it made."""
    module = importlib.import_module(f"stages.{stage}")
    program.perform(stage, module.work, module.Parameters, lambda: parameters(changes))
