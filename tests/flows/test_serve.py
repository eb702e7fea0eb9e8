"""`ear serve`: server and deployments in one program, which leaves nothing behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]


def deployments(address: str) -> list[str]:
    """FLOW of every deployment, by the server's own answer."""
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{address}/api/flows/filter", data=b"{}", headers=headers)
    return sorted(flow["name"] for flow in json.load(urllib.request.urlopen(request)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_program_serves_all_flows_and_ends_with_its_children(tmp_path, number):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment |= {"PREFECT_HOME": str(tmp_path), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "ear", "serve", "--port", str(port)]
    said = tmp_path / "said"
    with said.open("w") as file:
        program = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while f"open http://127.0.0.1:{port}" not in said.read_text():
            assert program.poll() is None, said.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        while deployments(f"http://127.0.0.1:{port}") != ["compare", "pipeline", "sweep"]:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        children = psutil.Process(program.pid).children(recursive=True)
        program.send_signal(number)
        assert program.wait(120) == 130
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == []
        assert said.read_text().endswith("serve: stopped\n")
    finally:
        program.kill()


def test_a_taken_port_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
        command = [sys.executable, "-m", "flows.serve", "--port", str(port)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"serve: port {port} of 127.0.0.1 is taken; give another --port\n")
