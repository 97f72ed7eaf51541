"""How long a step takes, and what losses the user has told since the last launch."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Pace"]

# A median over so many steps is not moved by an evaluation or a checkpoint between two of them.
_STEPS = 64


class Pace:
    """Times steps, without the time that the training thread waits for communication.

    Attributes:
        loss: sum of the losses since :meth:`forget_losses`.
        losses: how many there were.
    """

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None
        self._seconds: deque[float] = deque(maxlen=_STEPS)
        self.loss: float | Tensor = 0.0
        self.losses = 0

    def step(self, exposed: float) -> None:
        """A step has ended.

        Args:
            exposed: seconds that the training thread has waited, in all.
        """
        now = time.perf_counter()
        if self._last is not None:
            began, waited = self._last
            self._seconds.append(max(0.0, now - began - (exposed - waited)))
        self._last = now, exposed

    @property
    def step_seconds(self) -> float:
        """Time of a step, the median over the last ones; 0 if there were none."""
        return statistics.median(self._seconds) if self._seconds else 0.0

    def observe(self, loss: float | Tensor) -> None:
        """The loss of a step."""
        if isinstance(loss, Tensor):
            loss = loss.detach().to(torch.float64)
        self.loss = self.loss + loss
        self.losses += 1

    def state_dict(self) -> dict[str, float | int]:
        """The losses as plain values; without those that have no meaning."""
        total = float(self.loss)
        good = math.isfinite(total)
        return {"sum": total if good else 0.0, "count": self.losses if good else 0}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.loss, self.losses = saved["sum"], saved["count"]

    def forget_losses(self) -> None:
        """A launch has told them."""
        self.loss, self.losses = 0.0, 0
