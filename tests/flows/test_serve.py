"""`ear serve`: server and deployments in one program, which leaves nothing behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from browser import CHROMIUM, browser_page, needs_browser
from repositories import fresh

from ear import config
from ear.lineage.declaration import declarations
from flows import serve
from flows.form import Overrides, Stages

ROOT = Path(__file__).resolve().parents[2]


def ask(address: str, what: str) -> list[dict]:
    """All flows, deployments or flow runs that the server knows."""
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{address}/api/{what}/filter", data=b"{}", headers=headers)
    return json.load(urllib.request.urlopen(request))


@contextlib.contextmanager
def served(folder: Path, home: Path) -> Iterator[tuple[subprocess.Popen, str, Path]]:
    """`ear serve` in a folder => the program, its page's address, and the file of its output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment |= {"PREFECT_HOME": str(home), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "ear", "serve", "--port", str(port)]
    said, address = home / "said", f"http://127.0.0.1:{port}"
    with said.open("w") as file:
        program = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 300
        while f"open {address}" not in said.read_text() or len(ask(address, "deployments")) < 3:
            assert program.poll() is None, said.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield program, address, said
    finally:
        program.kill()


STOPPED = (130, [], "serve: stopped")


def stop(program: subprocess.Popen, number: int, said: Path) -> tuple[int, list[psutil.Process], str]:
    """Send a signal to `ear serve` => its exit code, those of its children that are left, its last line."""
    children = psutil.Process(program.pid).children(recursive=True)
    program.send_signal(number)
    code = program.wait(120)
    _, alive = psutil.wait_procs(children, timeout=10)
    return code, alive, said.read_text().splitlines()[-1]


# With a browser, the next test does the same, but for the signal.
@(pytest.mark.slow if CHROMIUM else pytest.mark.skipif(False, reason=""))
def test_one_program_serves_all_flows_and_ends_with_its_children(tmp_path):
    with served(ROOT, tmp_path) as (program, address, said):
        assert sorted(flow["name"] for flow in ask(address, "flows")) == ["compare", "pipeline", "sweep"]
        assert stop(program, signal.SIGTERM, said) == STOPPED


@needs_browser
def test_the_form_of_the_page_sends_what_was_filled_in(tmp_path):
    """One field of over a hundred; the others, switches too, are left out of the run's parameters."""
    (folder := tmp_path / "repository").mkdir()
    fresh(folder)
    (home := tmp_path / "home").mkdir()
    with served(folder, home) as (program, address, said), browser_page() as (page, left):
        flows = {flow["id"]: flow["name"] for flow in ask(address, "flows")}
        (deployment,) = (d["id"] for d in ask(address, "deployments") if flows[d["flow_id"]] == "pipeline")
        page.goto(f"{address}/deployments/deployment/{deployment}/run")
        page.locator("xpath=//*[contains(text(), 'sample.guidance (')]/following::input[1]").fill("2.5")
        page.get_by_role("button", name="Submit").click()
        deadline = time.monotonic() + 60
        while not (runs := ask(address, "flow_runs")):
            assert time.monotonic() < deadline
            page.wait_for_timeout(200)  # the page's requests pass through this process
        assert [run["parameters"] for run in runs] == [
            {"stages": [], "overrides": {"sample.guidance": 2.5}, "force": False}
        ]
        assert left == []
        assert stop(program, signal.SIGINT, said) == STOPPED


def test_the_form_has_every_key_and_stage():
    fields = Overrides.__metadata__[0].json_schema["properties"]
    parameters = config.load(ROOT / "params.yaml").model_dump()
    assert fields.keys() == {f"{section}.{key}" for section, keys in parameters.items() for key in keys}
    assert fields["sample.guidance"]["type"] == "number"
    assert fields["score.name"]["enum"] == ["energy", "kernel", "logarithmic", "hyvarinen", "categorical"]
    assert fields["data.mirror"]["enum"] == [True, False]
    assert Stages.__metadata__[0].json_schema["items"]["enum"] == list(declarations())


@pytest.fixture
def refused(monkeypatch, capsys) -> Iterator[Callable[..., str]]:
    """What `python -m flows.serve` says, in this process, when it ends at once with code 1."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def said(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["serve", *arguments])
        assert serve.main() == 1
        out, error = capsys.readouterr()
        assert out == ""
        return error

    yield said
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_named_server_that_does_not_answer_is_one_line():
    """As a program: Prefect reads its settings when it is imported."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/api"
        command = [sys.executable, "-m", "flows.serve"]
        environment = os.environ | {"PREFECT_API_URL": url}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"serve: PREFECT_API_URL is {url}, but no Prefect server answers there; unset it to start one\n"
    )


def test_outside_a_repository_it_says_so(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused() == f"serve: prefect.yaml is not in {tmp_path}; run it from the repository's root\n"


def test_a_taken_port_is_one_line(refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert refused("--port", str(port)) == f"serve: port {port} of 127.0.0.1 is taken; give another --port\n"
