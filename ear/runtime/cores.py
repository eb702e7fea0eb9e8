"""The CPU cores that this process may use."""


def cores() -> int:
    """Number of CPU cores that the process's affinity and its container's CPU quota allow."""
    from joblib import cpu_count

    return cpu_count()
