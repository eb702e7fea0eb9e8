"""Compose conf/ into params.yaml: python -m ear.configure preset=NAME section.key=value ...

Presets are the files of conf/preset/; NAME_smoke is the laptop-size form of NAME, the whole pipeline in a minute or
two. The result is checked before params.yaml is touched, and replaces it whole.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from ear import config, records


def compose(overrides: list[str]) -> config.Parameters:
    """Hydra's composition of conf/config.yaml and the overrides, checked.

    Raises ValueError naming the key or the preset that is wrong.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        with initialize_config_module("conf", version_base="1.3"):
            composed = OmegaConf.to_container(hydra_compose("config", overrides), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_one_line(error)) from error
    except YAMLError as error:
        raise ValueError(f"a file of conf/ is not valid YAML: {' '.join(str(error).split())}") from error
    return config.parse(composed, origin="conf")


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Could not find 'preset/" in str(error):
        return f"{lines[0]}; known presets: {', '.join(presets())}."
    return f"{lines[0]}; `python -m ear.configure --help` lists the keys."


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

    return Path(conf.__file__).parent / "preset"


def to_yaml(parameters: config.Parameters, command: str) -> str:
    """Commented YAML: every key with its documentation, in the order of the schema."""
    lines = [f"# Written by `{command}`; edit freely. DVC reruns the stages that read what you change.", ""]
    for section in dataclasses.fields(parameters):
        values = getattr(parameters, section.name)
        tracked = "  # not tracked: must not change a result" if section.name == "runtime" else ""
        lines.append(f"{section.name}:{tracked}")
        for item in dataclasses.fields(values):
            lines.append(f"  {f'{item.name}: {_scalar(getattr(values, item.name))}':<31} # {item.metadata['help']}")
        lines.append("")
    return "\n".join(lines)


def _scalar(value) -> str:
    """A value as YAML that DVC, OmegaConf and PyYAML read alike (a float always has a dot)."""
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return (mantissa if "." in mantissa else mantissa + ".0") + e + exponent
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _help() -> str:
    sections = dataclasses.fields(config.Parameters)
    lines = [__doc__, *(f"  {name:<28} {describe_preset(name)}" for name in presets()), ""]
    for section in sections:
        for item in dataclasses.fields(section.type):
            lines.append(f"  {section.name + '.' + item.name:<28} {item.metadata['help']}")
    return "\n".join(lines)


def main() -> None:
    """Write params.yaml, or explain in one line what is wrong and exit with 1."""
    parser = argparse.ArgumentParser(
        prog="python -m ear.configure", description=_help(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="preset=NAME and section.key=value", metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, default=Path("params.yaml"), help="file to write (default: params.yaml)")
    arguments = parser.parse_args()
    try:
        parameters = compose(arguments.overrides)
    except ValueError as error:
        print(f"configure: {error}", file=sys.stderr)
        sys.exit(1)
    command = " ".join(["python -m ear.configure", *(arguments.overrides or ["preset=digits"])])
    with records.whole_file(arguments.output) as partial:
        partial.write_text(to_yaml(parameters, command))
    print(f"wrote {arguments.output}")
    for sentence in config.missing_files(parameters).values():
        print(f"note: {sentence}")


if __name__ == "__main__":
    main()
