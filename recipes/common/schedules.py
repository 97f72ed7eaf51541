"""Learning-rate schedules, as pure functions of the optimizer step."""

import math
from collections.abc import Sequence

__all__ = ["cosine_schedule", "step_schedule"]


def step_schedule(
    step: int, *, start: float, warmup_steps: int, milestones: Sequence[int], decay: float
) -> float:
    """Learning rate at optimizer step number ``step``, counted from 0, as a multiple of the full.

    It rises linearly from ``start`` at step 0 to 1 at step ``warmup_steps``, and from each of the
    ``milestones`` on is multiplied by ``decay`` once more.
    """
    if step < warmup_steps:
        return start + (1 - start) * step / warmup_steps
    return decay ** sum(step >= milestone for milestone in milestones)


def cosine_schedule(
    step: int, *, start: float, warmup_steps: int, total_steps: int, end: float
) -> float:
    """Learning rate at optimizer step number ``step``, counted from 0, as a multiple of the full.

    It rises linearly from ``start`` at step 0 to 1 at step ``warmup_steps``, and falls from there
    along half a cosine to ``end`` at step ``total_steps`` (Loshchilov & Hutter, ICLR 2017).
    """
    if step < warmup_steps:
        return start + (1 - start) * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2
