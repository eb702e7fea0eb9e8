"""The pages of docs/: the site builds without a broken link, loads nothing from elsewhere, and names real commands."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import browser_page, needs_browser
from click.testing import CliRunner

from ear.commands.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/*.md"))
PROGRAM = re.compile(r"^(?:\w+=\S+ )*(?:python -m (?P<module>[\w.]+)|ear (?P<command>[\w-]+))(?P<rest>[^#\n]*)", re.M)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_strictly_with_the_python_interface(site):
    page = (site / "python.html").read_text()
    for name in ("generate", "load_pipeline", "load_published"):
        assert f".{name}" in page


@needs_browser
def test_pages_open_in_a_browser_and_load_nothing_from_elsewhere(site):
    with browser_page() as (page, left):
        for name in ("index", "method", "watching", "python", "scores"):
            page.goto((site / f"{name}.html").as_uri())
            assert page.locator("h1").count() == 1
            assert page.evaluate("[...document.images].filter(i => !i.naturalWidth).length") == 0
        assert left == []


def commands() -> list[tuple[str, str, str]]:
    """(page, program, options) of every command in a code block of docs/."""
    found = []
    for path in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", path.read_text().replace("\\\n", " "), re.S):
            for match in PROGRAM.finditer(block):
                found.append((path.name, match["module"] or f"ear {match['command']}", match["rest"]))
    return found


@pytest.mark.parametrize(("page", "program", "rest"), commands())
def test_every_program_that_a_page_names_exists_with_these_options(page, program, rest):
    """What a page tells to run is run by the tests of that command; here, names and options must be right."""
    options = set(re.findall(r"(?<!\S)(--[\w-]+)", rest))
    if program.startswith("ear "):
        command = main.commands[program.removeprefix("ear ")]
        known = {"--help", *(name for parameter in command.params for name in parameter.opts)}
        assert options <= known
        assert CliRunner().invoke(main, [program.removeprefix("ear "), "--help"]).exit_code == 0
    elif program.split(".")[0] in ("flows", "benchmarks", "stages"):
        source = Path(importlib.util.find_spec(program).origin).read_text()
        for option in options:
            assert f'"{option}"' in source, f"{program} has no {option}"
