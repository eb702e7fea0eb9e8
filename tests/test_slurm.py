"""docs/slurm.sbatch under a real bash; only Slurm's and DVC's commands are stand-ins."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

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
# With fetch, prepare and tokenizer up to date, and each command written down.
QUICK_DVC = """#!/bin/bash
echo "$@" >> dvc
[ "$1" = status ] && [ "$3" != tokenizer ] && exit 1
exit 0
"""
# Which trains until it gets SIGTERM, as srun passes it on to its tasks; other stages take no time.
SRUN = """#!/bin/bash
echo "$@" >> srun
[[ "$*" == *stages.train ]] || exit 0
trap "sleep 1; echo all > saved; exit 1" TERM
touch started
while true; do sleep 0.05; done
"""
SCONTROL = '#!/bin/bash\necho "$@" >> scontrol\n[ "$1" != show ] || { echo node1; sleep 0.1; echo node2; }\n'


@contextlib.contextmanager
def started(folder: Path, **commands: str) -> Iterator[subprocess.Popen]:
    """The script in a folder of its own, with these commands, once a stage works."""
    (folder / ".venv/bin").mkdir(parents=True)
    for name, text in {**commands, "scontrol": SCONTROL}.items():
        (folder / ".venv/bin" / name).write_text(text)
        (folder / ".venv/bin" / name).chmod(0o755)
    variables = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7"}
    variables |= {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    process = subprocess.Popen([shutil.which("bash"), SCRIPT], cwd=folder, env=os.environ | variables)
    try:
        limit = time.monotonic() + 60
        while not (folder / "started").exists():
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            for member in (*psutil.Process(process.pid).children(recursive=True), process):
                member.kill()


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_the_job_is_requeued_after_the_stage_has_saved(tmp_path):
    with started(tmp_path, dvc=DVC) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert (tmp_path / "saved").read_text() == "all"
    assert lines(tmp_path / "scontrol") == ["show hostnames node[1-2]", "requeue 7"]


def test_stages_run_on_all_machines_are_recorded_and_requeued(tmp_path):
    with started(tmp_path, dvc=QUICK_DVC, srun=SRUN) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert (tmp_path / "saved").read_text() == "all\n"
    begun = ["reference", "reconstruct", "cache", "train"]  # tokenizer is up to date
    launcher = "-m torch.distributed.run --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d"
    rendezvous = "--rdzv-endpoint=node1:29500 --rdzv-id=7"
    assert lines(tmp_path / "srun") == [
        f"--kill-on-bad-exit=1 python {launcher} {rendezvous} -m stages.{stage}" for stage in begun
    ]
    recorded = [line for line in lines(tmp_path / "dvc") if line.startswith("commit")]
    assert recorded == [f"commit --force {stage}" for stage in begun[:-1]]
    assert lines(tmp_path / "scontrol")[-1] == "requeue 7"
