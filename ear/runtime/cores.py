"""The CPU cores that this process may use."""

import os


def cores() -> int:
    """Their number: those that the scheduler allows, where the system can say so, else those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
