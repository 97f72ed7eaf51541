"""Ranks with fewer batches than others: what torch's Join runs on those that are done."""

from __future__ import annotations

from typing import Protocol

from torch.distributed.algorithms.join import JoinHook

__all__ = ["ShadowRounds"]


class _Shadows(Protocol):
    def shadow_step(self) -> None: ...

    def end_shadowing(self) -> None: ...


class ShadowRounds(JoinHook):
    """Takes part in the others' rounds with this rank's last parameters, then finishes."""

    def __init__(self, shadows: _Shadows) -> None:
        self._shadows = shadows

    def main_hook(self) -> None:
        """One step of the ranks that still train."""
        self._shadows.shadow_step()

    def post_hook(self, is_last_joiner: bool) -> None:
        """All are done. DDP copies one rank's model to all others next: make it everybody's."""
        self._shadows.end_shadowing()
