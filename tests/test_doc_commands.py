"""Every command in a fenced block of README.md and docs/ runs here, with tiny parameters, or says why not."""

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import small_imagenet
from click.testing import CliRunner
from photographs import write_class_folders
from repositories import IDENTITY, environment, reproduced, run

from ear.commands.cli import main
from ear.config.compose import compose
from ear.config.document import to_yaml

ROOT = Path(__file__).parents[1]
PAGES = [path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if "```sh\n" in path.read_text()]
SLOW = {"README.md", "sweeps.md"}  # a minute or two of experiments each
NOT_RUN = {
    r"make |source |sudo apt-get": "set up what this test runs in",
    r"pip install": "set up what this test runs in; a test may not change its own environment",
    r"ear playground": "serves until it is stopped: tests/commands/test_playground.py",
    r"ear serve": "serves until it is stopped: tests/flows/test_serve.py",
    r"ear watch": "while a training runs: tests/commands/test_watch.py",
    r"tensorboard ": "serves until it is stopped; tests/display/test_live.py reads its data",
    r".*prefect (server|worker|deployment|--no-prompt)": "with a server and a worker: tests/flows/test_flows.py",
    r"ear doctor": "fails where the preset of the page needs a GPU: tests/commands/test_doctor.py",
    r"python -m benchmarks.sprites": "needs a package of Debian: tests/benchmarks/test_sprites.py",
    r"dvc repro --pull": "after a push, in tests/test_pipeline.py",
    r"python -m flows.search": "20 trials; tests/flows/test_flows.py runs a few",
    r"dvc (push|pull)": "with the clone of a colleague, in tests/test_pipeline.py",
    r"ear describe": "counts operations; tests/commands/test_describe.py and tests/commands/test_costs.py",
}
PRESETS = "`dvc repro` of presets trains for hours: tests/stages/test_folder64.py and its neighbours run smoke presets"


def commands(page: Path) -> list[str]:
    """The commands of a page's code blocks, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text().replace("\\\n", " "), re.S | re.M)
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def reason(command: str) -> str:
    """Why a command is not run; empty if it is."""
    return next((text for pattern, text in NOT_RUN.items() if re.match(pattern, command)), "")


@pytest.fixture
def repository(tmp_path) -> Path:
    """A repository with committed results, a remote, and what the pages call /my/images, /data/imagenet and so on."""
    folder = reproduced(tmp_path / "copy")
    run("git", "add", "-A", cwd=folder)
    run("git", *IDENTITY, "commit", "-q", "-m", "results", cwd=folder)
    run("git", "init", "-q", "--bare", str(tmp_path / "remote"), cwd=folder)
    run("git", "remote", "add", "origin", str(tmp_path / "remote"), cwd=folder)
    settings = {"push.autoSetupRemote": "true", "user.name": "tests", "user.email": "tests@localhost"}
    for name, value in settings.items():
        run("git", "config", name, value, cwd=folder)
    write_class_folders(tmp_path / "my/images", each=3)
    np.savez(tmp_path / "my/arrays.npz", images=np.zeros((40, 28, 28), np.uint8), labels=np.arange(40) % 4)
    small_imagenet.write_tree(tmp_path / "data/imagenet")
    return folder


def outcome(command: str) -> tuple[int, str]:
    """The exit code of a command in the current folder, and what it says; an `ear` command runs in this process."""
    if command.startswith("ear "):
        result = CliRunner().invoke(main, shlex.split(command)[1:])
        return result.exit_code, result.output
    done = subprocess.run(["bash", "-ec", command], env=environment(), text=True, capture_output=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page.name in SLOW), id=page.name) for page in PAGES]
)
def test_the_commands_of_a_page_run_one_after_the_other(page, repository, tmp_path, monkeypatch):
    monkeypatch.chdir(repository)
    large, ran = False, []
    for command in commands(page):
        if reason(command) or (large and command == "dvc repro"):  # see NOT_RUN and PRESETS
            continue
        if "configure preset=" in command:  # over an unedited file, as in a clone
            (repository / "params.yaml").write_text(to_yaml(compose([]), "ear configure preset=digits"))
            large = "preset=digits" not in command
        here = re.sub(r"(?<![\w.])/(my|data|mnt)/", rf"{tmp_path}/\1/", command)
        code, said = outcome(here)
        assert code == 0, f"{command}\n{said}"
        ran.append(command)
    print(f"{page.name}: {len(ran)} commands")


def test_reasons_are_of_commands_that_exist():
    everything = [command for page in PAGES for command in commands(page)]
    for pattern in NOT_RUN:
        assert any(re.match(pattern, command) for command in everything), pattern
    named = {path for text in (*NOT_RUN.values(), PRESETS) for path in re.findall(r"tests/[\w/]+\.py", text)}
    assert all((ROOT / path).is_file() for path in named), named
    assert len([command for command in everything if not reason(command)]) > len(everything) / 2
