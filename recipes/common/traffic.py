"""What training alone has sent and waited for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from commhooks import CommHookState, Stats

__all__ = ["Traffic", "gradient_bytes", "ring_bytes"]


class Traffic:
    """The counters of a state, without what evaluations of the consensus model added to them.

    A run that is evaluated more often should not look as if its algorithm communicated more.

    Args:
        state: the registered state, or None under plain DDP, which counts nothing.
    """

    def __init__(self, state: CommHookState | None) -> None:
        self._state = state
        self._bytes = 0
        self._exposed = 0.0
        self._hidden = 0.0

    @contextmanager
    def not_counted(self) -> Iterator[None]:
        """Leave what happens inside the block out of the figures."""
        before = self.stats
        yield
        after = self.stats
        if before is not None and after is not None:
            self._bytes += after.bytes_reduced - before.bytes_reduced
            self._exposed += after.seconds_exposed - before.seconds_exposed
            self._hidden += after.seconds_hidden - before.seconds_hidden

    @property
    def uncounted(self) -> tuple[int, float, float]:
        """What was left out so far: bytes, and seconds exposed and hidden."""
        return self._bytes, self._exposed, self._hidden

    def go_on_from(self, uncounted: tuple[int, float, float]) -> None:
        """Leave out what was left out before a restart; the state's counters go on as well."""
        self._bytes, self._exposed, self._hidden = uncounted

    @property
    def stats(self) -> Stats | None:
        """The counters so far."""
        if self._state is None:
            return None
        stats = self._state.stats
        return replace(
            stats,
            bytes_reduced=stats.bytes_reduced - self._bytes,
            seconds_exposed=stats.seconds_exposed - self._exposed,
            seconds_hidden=stats.seconds_hidden - self._hidden,
        )


def gradient_bytes(model: nn.Module) -> int:
    """What plain DDP all-reduces at a step; its broadcast of buffers is not counted."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def ring_bytes(payload: float, workers: int) -> float:
    """What a ring all-reduce of ``payload`` bytes sends over one worker's link."""
    return 2 * (workers - 1) / workers * payload
