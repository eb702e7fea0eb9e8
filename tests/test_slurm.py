"""docs/slurm.sbatch under a real bash; only Slurm's and DVC's commands are stand-ins."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs/slurm.sbatch"
# As DVC does: on SIGINT it waits for its stage, on SIGTERM it dies. The stage takes a second to save.
DVC = """#!/bin/bash
[ "$1" = repro ] || exit 0
trap '' INT
python -c "
import signal, sys, time
def save(*_):
    time.sleep(1)
    open('saved', 'w').write('all')
    sys.exit(1)
signal.signal(signal.SIGINT, save)
open('started', 'w').close()
time.sleep(60)
"
"""


@pytest.fixture
def job(tmp_path):
    """The script in a folder of its own, started and waiting for its first stage."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name, text in (("dvc", DVC), ("scontrol", '#!/bin/bash\necho "$@" >> scontrol\n')):
        (tmp_path / ".venv/bin" / name).write_text(text)
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    variables = {"SLURM_JOB_NODELIST": "one", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "1"}
    process = subprocess.Popen([shutil.which("bash"), SCRIPT], cwd=tmp_path, env=os.environ | variables)
    limit = time.monotonic() + 20
    while not (tmp_path / "started").exists():
        assert time.monotonic() < limit
        time.sleep(0.05)
    yield tmp_path, process
    process.kill()


def test_the_job_is_requeued_after_the_stage_has_saved(job):
    folder, process = job
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert (folder / "saved").read_text() == "all"
    assert (folder / "scontrol").read_text().splitlines() == ["show hostnames one", "requeue 7"]


def test_the_script_is_a_valid_one():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
