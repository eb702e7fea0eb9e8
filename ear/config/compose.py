"""Hydra's composition of conf/: presets and overrides => checked parameters."""

import re
import shlex
from pathlib import Path

from ear.config.parameters import Parameters, parse
from ear.errors import UserError


def compose(overrides: list[str]) -> Parameters:
    """conf/config.yaml with the overrides (preset=NAME, section.key=value), checked.

    Raises UserError naming the key or the preset that is wrong.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        with initialize_config_module("conf", version_base="1.3"):
            composed = OmegaConf.to_container(hydra_compose("config", overrides), resolve=True)
    except OverrideParseException as error:
        key, _, value = error.override.partition("=")
        example = shlex.quote(f"{key}={quoted(value)}")
        raise UserError(
            f"{error.override!r} cannot be read; if it holds special characters, write {example}."
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from error
    except YAMLError as error:
        raise UserError(f"a file of conf/ is not valid YAML: {' '.join(str(error).split())}") from error
    return parse(composed, origin="conf")


def quoted(value: str) -> str:
    """Quote an override's value for Hydra, unless it has only letters, digits and path characters."""
    if re.fullmatch(r"[\w./@:+-]+", value, re.ASCII):
        return value
    escaped = re.sub(r"(\\*)(?='|$)", r"\1\1", value).replace("'", "\\'")
    return f"'{escaped}'"


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Could not find 'preset/" in str(error):
        return f"{lines[0]}; known presets: {', '.join(presets())}."
    return f"{lines[0]}; `ear configure --help` lists the keys."


def presets() -> list[str]:
    """Names of the files in conf/preset/."""
    return sorted(path.stem for path in _preset_folder().glob("*.yaml"))


def describe_preset(name: str) -> str:
    """The first sentence of the comment in the preset's file."""
    lines = (_preset_folder() / f"{name}.yaml").read_text().splitlines()
    comment = " ".join(line.removeprefix("# ") for line in lines if line.startswith("# ") and "@" not in line)
    return comment.partition(". ")[0].rstrip(".:")


def _preset_folder() -> Path:
    import conf

    return Path(str(conf.__file__)).parent / "preset"
