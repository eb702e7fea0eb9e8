"""The number of cores follows the affinity of the process."""

import os
import subprocess
import sys

import pytest

PROGRAM = "import os; os.sched_setaffinity(0, {%d}); from ear.runtime.cores import cores; print(cores())"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_a_process_that_is_bound_to_one_core_has_one():
    program = PROGRAM % min(os.sched_getaffinity(0))
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "1\n"
