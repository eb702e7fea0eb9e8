"""Prefect's server and all deployments in one program, on this machine's loopback address (`ear serve`).

    python -m flows.serve

It prints the address of the page, on which the flows pipeline, sweep and compare are started, watched and cancelled.
One run at a time: runs that are started meanwhile wait. Ctrl-C and SIGTERM end it, with the stage that runs. With
PREFECT_API_URL set, that server is used instead of a new one.
"""

# isort: off
import flows.settings  # noqa: F401 - first: Prefect reads its settings when it is imported

# isort: on
import argparse
import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from flows.command import family, send
from flows.program import server_answers

HOST = "127.0.0.1"
DECLARED = Path("prefect.yaml")
_FAREWELL = 90.0  # seconds for a running stage to save its work, and for Prefect to note it
_PATIENCE = 600.0  # seconds for the server's first start, which migrates a database


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=4200, help="of the page (default: 4200)")
    arguments = parser.parse_args()
    if not DECLARED.is_file():
        print(f"serve: {DECLARED} is not in {Path.cwd()}; run it from the repository's root", file=sys.stderr)
        return 1
    if taken(arguments.port) and not os.environ.get("PREFECT_API_URL"):
        print(f"serve: port {arguments.port} of {HOST} is taken; give another --port", file=sys.stderr)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        with server(arguments.port) as url:
            # In a process of its own: this one imported Prefect before it knew the server.
            program = [sys.executable, "-c", "from flows.serve import serve_all; serve_all()"]
            with _child(program, os.environ | {"PREFECT_API_URL": url}, _FAREWELL) as runner:
                print(f"open {url.removesuffix('/').removesuffix('/api')} (Ctrl-C ends it)", flush=True)
                return runner.wait()
    except Stopped:
        print("serve: stopped", file=sys.stderr)
        return 130
    except RuntimeError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1


class Stopped(BaseException):
    """A signal asked this program to end."""


def _stop(*_: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the children are given time to end
    raise Stopped


@contextlib.contextmanager
def _child(command: list[str], environment: Mapping[str, str], patience: float, **options: Any) -> Iterator[Any]:
    """Run a program in its own session; at the end, interrupt it, and kill it after `patience` seconds.

    In its own session, it gets no Ctrl-C from the terminal. Its descendants end with it, in whatever session they are.
    """
    process = subprocess.Popen(command, env=environment, start_new_session=True, **options)
    try:
        yield process
    finally:
        members = family(process)
        send(members[:1] if process.poll() is None else members, signal.SIGINT)
        _, left = psutil.wait_procs(members, timeout=patience)
        send(left, signal.SIGKILL)
        process.wait()


def serve_all() -> None:
    """Serve the deployments of prefect.yaml, one run at a time, until interrupted."""
    from prefect import serve
    from ruamel.yaml import YAML

    deployments: list[Any] = []
    for entry in YAML(typ="safe").load(DECLARED)["deployments"]:
        file, _, name = entry["entrypoint"].partition(":")
        flow = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)
        options = {key: entry[key] for key in ("description", "parameters") if key in entry}
        deployments.append(flow.to_deployment(entry["name"], **options))
    serve(*deployments, limit=1, print_starting_message=False)


@contextlib.contextmanager
def server(port: int) -> Iterator[str]:
    """The URL of the API of a Prefect server that answers: PREFECT_API_URL, or that of a new one, ended afterwards.

    Raises RuntimeError if none answers.
    """
    if url := os.environ.get("PREFECT_API_URL"):
        if not server_answers(url):
            raise RuntimeError(f"PREFECT_API_URL is {url}, but no Prefect server answers there; unset it to start one")
        yield url
        return
    address = f"http://{HOST}:{port}"
    environment = os.environ | {"PREFECT_UI_API_URL": f"{address}/api", "PREFECT_API_URL": f"{address}/api"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    with _child(command, environment, 20.0, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _await(address, process)
        yield f"{address}/api"


def _await(address: str, process: subprocess.Popen) -> None:
    """Wait until the server answers; raises RuntimeError if it ends, or takes ten minutes."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(
                f"Prefect's server ended with code {process.returncode}; `prefect server start` says why"
            )
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.3)
    raise RuntimeError(f"Prefect's server did not answer within {_PATIENCE:.0f} s")


def taken(port: int) -> bool:
    """Whether something listens on the port."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


if __name__ == "__main__":
    sys.exit(main())
