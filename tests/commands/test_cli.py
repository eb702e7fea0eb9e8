"""The command `ear` as a user starts it."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ear.commands.cli import main

SCRIPT = Path(sys.executable).with_name("ear")


def run(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", [[str(SCRIPT)], [sys.executable, "-m", "ear"]])
def test_help_lists_every_command(command):
    done = run(*command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: ear ")
    for name in main.commands:
        assert f"\n  {name} " in done.stdout


def test_help_needs_neither_torch_nor_pydantic():
    program = (
        "import sys\n"
        "from ear.commands.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'pydantic', 'numpy', 'hydra'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = run(sys.executable, "-c", program)
    assert done.stderr == "[]\n"


def test_configure_help_lists_presets_and_keys():
    text = run(str(SCRIPT), "configure", "--help").stdout
    assert "  imagenet256_base " in text
    assert "  train.learning_rate          peak rate" in text
    assert "  score.samples                energy, kernel: samples per token, at least 2; hyvarinen: noise" in text


def test_configure_writes_parameters_and_schema(tmp_path):
    done = run(str(SCRIPT), "configure", "preset=digits_smoke", "sample.guidance=3", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "wrote params.yaml\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params.schema.json", "params.yaml"]
    lines = (tmp_path / "params.yaml").read_text().splitlines()
    assert lines[0] == "# yaml-language-server: $schema=params.schema.json"
    assert "`ear configure preset=digits_smoke sample.guidance=3`" in lines[1]


def test_a_mistake_is_one_line_and_writes_nothing(tmp_path):
    done = run(str(SCRIPT), "configure", "sample.guidnce=3", cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("configure: ")
    assert "sample.guidnce" in line
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_names_the_known_ones_in_help():
    done = run(str(SCRIPT), "configur")
    assert done.returncode == 2
    assert "configur" in done.stderr


def configured(*arguments: str) -> tuple[int, str]:
    """`ear configure` in this process and the current folder => its exit code and the first line that it says."""
    done = CliRunner().invoke(main, ["configure", *arguments])
    return done.exit_code, done.output.splitlines()[0]


def test_configure_never_replaces_an_edited_file_silently(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("params.yaml")
    assert configured("preset=digits") == (0, "wrote params.yaml")
    assert configured("preset=digits_smoke") == (0, "wrote params.yaml")
    path.write_text(path.read_text().replace("  guidance: 1.8 ", "  guidance: 4.4 ") + "# mine\n")
    edited = path.read_text()
    code, said = configured("preset=digits")
    assert code == 1
    assert said.startswith("configure: params.yaml has been edited (sample.guidance: 1.8, now 4.4); add --force")
    assert path.read_text() == edited
    assert configured("sample.steps=5") == (0, "changed sample.steps in params.yaml")
    assert path.read_text() == edited.replace("  steps: 8 ", "  steps: 5 ")
    path.write_text("sample: 3\n")
    assert configured("preset=digits")[1].startswith("configure: params.yaml has been edited (it names no")
    assert configured("preset=digits", "--force") == (0, "wrote params.yaml")


def test_configure_recognises_its_own_file_with_a_path_of_several_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my images").mkdir()
    for preset in ("folder64", "folder64_smoke"):
        assert configured(f"preset={preset}", "data.path='my images'") == (0, "wrote params.yaml")
    assert configured("preset=digits") == (0, "wrote params.yaml")
