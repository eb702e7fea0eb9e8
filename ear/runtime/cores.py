"""The CPU cores that this process may use."""


def cores() -> int:
    """Their number: those that the affinity of the process and the CPU quota of its container allow."""
    from joblib import cpu_count

    return cpu_count()
