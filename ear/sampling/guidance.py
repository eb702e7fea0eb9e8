"""Classifier-free guidance scales over the sampling steps (EAR, section 4; Ho & Salimans, 2022)."""

from ear.errors import UserError


def scale_at(
    schedule: str, scale: float, *, tokens: int, masked: int, interval: tuple[float, float] = (0.0, 1.0)
) -> float:
    """The guidance scale of a step after which `masked` of `tokens` are still masked; 1 means no guidance.

    linear: 1 + (scale - 1) (L - n) / L for n of L tokens masked, from about 1 to just below `scale`; like the published
    sampler, it counts one token as masked even after the last step. constant: `scale`. interval (a, b): guidance acts
    only if the share of tokens known after the step is in (a, b], similar to the noise-level interval of Kynkaanniemi
    et al. (2024). Raises UserError for another schedule.
    """
    begin, end = interval
    if not begin < (tokens - masked) / tokens <= end:
        return 1.0
    if schedule == "linear":
        return 1.0 + (scale - 1.0) * (tokens - max(masked, 1)) / tokens
    if schedule == "constant":
        return scale
    raise UserError(f"schedule is {schedule!r}, but must be 'linear' or 'constant'.")
