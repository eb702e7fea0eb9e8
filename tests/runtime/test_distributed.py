import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from processes import together

from ear.display.progress import Progress
from ear.errors import UserError
from ear.runtime import distributed

ROOT = Path(__file__).parents[2]


def test_one_process_needs_no_group():
    with distributed.group():
        assert (distributed.rank(), distributed.size(), distributed.is_main()) == (0, 1, True)
        assert distributed.own_slice(range(3)) == range(3)
        assert distributed.from_main(lambda: "x") == "x"
        assert distributed.any_of(True)
        assert not distributed.any_of(False)
        assert torch.equal(distributed.total(torch.ones(2)), torch.ones(2))
        distributed.barrier()


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("items", [0, 1, 7, 16])
def test_shares_are_the_whole_in_order_and_even(monkeypatch, processes, items):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    parts = []
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(distributed.own_slice(range(items)))
    assert [item for part in parts for item in part] == list(range(items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_ranks_share_a_sum_a_decision_and_the_value_of_rank_0():
    def work():
        own = torch.tensor([1.0, float(distributed.rank())])
        said = distributed.from_main(lambda: f"from {distributed.rank()}")
        found = distributed.any_of(distributed.rank() == 1), distributed.any_of(False)
        return distributed.total(own).tolist(), own.tolist(), said, found

    for rank, (total, own, said, found) in enumerate(together(work, 3)):
        assert total == [3.0, 3.0]
        assert own == [1.0, rank]
        assert said == "from 0"
        assert found == (True, False)


@pytest.mark.parametrize("items", [0, 1, 5, 6])
def test_items_are_worked_on_in_turns_and_come_in_order(items):
    def work():
        worked = []
        results = distributed.in_turns(range(items), lambda item: worked.append(item) or 10 * item)
        return worked, distributed.on_main(results, list)

    (first, results), (second, nothing) = together(work)
    assert results == [10 * item for item in range(items)]
    assert nothing is None
    assert (first, second) == (list(range(0, items, 2)), list(range(1, items, 2)))
    assert distributed.on_main(distributed.in_turns(range(items), lambda item: 10 * item), list) == results


@pytest.mark.parametrize("failing", [0, 1])
def test_one_failure_ends_all_and_is_told_once(failing):
    def work():
        if distributed.rank() == failing:
            raise ValueError("image 7 is broken")
        distributed.barrier()

    begun = time.monotonic()
    results = together(work)
    assert time.monotonic() - begun < 20
    assert str(results[failing]) == "image 7 is broken"
    assert isinstance(results[1 - failing], distributed.FailedElsewhere)


def test_a_failure_of_the_main_process_alone_ends_all():
    def main_only():
        raise FileNotFoundError("nothing there")

    first, second = together(lambda: distributed.from_main(main_only))
    assert isinstance(first, FileNotFoundError)
    assert isinstance(second, distributed.FailedElsewhere)


def test_the_main_process_works_alone_where_the_others_wait():
    def work():
        sizes = distributed.from_main(lambda: (distributed.size(), distributed.from_main(distributed.size)))
        return sizes, distributed.size()

    assert together(work) == [((1, 1), 2)] * 2


def test_the_same_failure_everywhere_is_told_once():
    def work():
        raise ValueError("all alike")

    kinds = sorted(type(error).__name__ for error in together(work))
    assert kinds == ["FailedElsewhere", "ValueError"]


def test_only_the_main_process_reports_progress(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        with Progress("work", 3) as progress:
            progress.advance(3)
        assert capsys.readouterr().out.count("work: 3/3") == lines


def test_a_world_size_that_a_shell_has_left_is_one_sentence(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"^WORLD_SIZE is 2, but MASTER_ADDR is not set; .* unset WORLD_SIZE\."):
        distributed.group().__enter__()


def test_launched_processes_end_when_one_is_killed(tmp_path):
    """SIGKILL to one of two: the other ends by itself, the launcher names the signal and gives a non-zero code."""
    (tmp_path / "killed.py").write_text(
        textwrap.dedent("""
            import os, pathlib, sys
            from ear.runtime import distributed

            if not distributed.launched():
                sys.exit(distributed.launch("killed", ["argument"], 2))
            assert sys.argv[1:] == ["argument"]
            with distributed.group():
                pathlib.Path(f"process-{distributed.rank()}").touch()
                distributed.barrier()
                if distributed.rank() == 1:
                    os.kill(os.getpid(), 9)
                distributed.barrier()
        """)
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "killed"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert sorted(path.name for path in tmp_path.glob("process-*")) == ["process-0", "process-1"]
    assert "process 1 of 2 was ended by SIGKILL" in ended.stderr
    assert "process 0 of 2 lost the connection to another" in ended.stderr
    assert signal.Signals.SIGTERM.name not in ended.stderr
