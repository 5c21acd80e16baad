"""Schedules are functions of the step: nothing to restore on resume. Built on lightly's cosine schedule."""

import functools


@functools.cache
def _lightly():  # type: ignore[no-untyped-def]
    # A heavy import, only where something is trained.
    from lightly.utils import scheduler

    return scheduler


def warmup_cosine(step: int, steps: int, peak: float, final: float = 0.0, warmup: int = 0) -> float:
    """Linear from 0 to `peak` over `warmup` steps (`peak` is reached at the last of them), then half a cosine
    to `final`.

    `step` counts from 0; `steps` is the length of the run, `warmup` is cut to it. A run of one step takes it
    at `peak`.
    """
    if steps == 1:
        return peak
    warmup = min(warmup, steps - 1)
    value = _lightly().cosine_warmup_schedule(
        step=step,
        max_steps=steps,
        start_value=peak,
        end_value=final,
        warmup_steps=warmup,
        warmup_start_value=0.0,
    )
    return float(value)


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at the last of `steps`; a run of one step takes it at
    `end`."""
    return float(_lightly().cosine_schedule(step, steps, start, end))


def linear(step: int, steps: int, start: float, end: float) -> float:
    """Linear from `start` at step 0 to `end` at `steps`, constant afterwards; `end` at once when `steps` is
    0."""
    return end if step >= steps else start + (end - start) * step / steps
