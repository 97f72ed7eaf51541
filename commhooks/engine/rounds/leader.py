"""Whose parameters are an island's, while some of its ranks are out of batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from commhooks.engine.network.communicator import Communicator
from commhooks.engine.steps.optimizers import OptimizerWatch
from commhooks.engine.vectors.buckets import Bucket

__all__ = ["Leader"]


class Leader:
    """The first rank of an island that still trains, or was the last to do so.

    Ranks that are out of batches (torch's Join) make no updates. Where it matters what their
    parameters are, they take them from this rank.

    Args:
        island: the ranks.
    """

    def __init__(self, island: Communicator) -> None:
        self._island = island
        # Its number in the island; None while all ranks train, or all have ended together.
        self._place: int | None = None

    def note(self, training: Sequence[bool]) -> None:
        """Which ranks have a batch for the step under way."""
        if all(training):
            self._place = None
        elif any(training):
            self._place = training.index(True)

    def share_parameters(self, buckets: Sequence[Bucket]) -> None:
        """Give its parameters to the whole island. Collective there.

        Raises:
            RuntimeError: a rank is gone.
        """
        if self._place is None:
            return
        with torch.no_grad():
            for bucket in buckets:
                flat = torch.empty(bucket.numel, dtype=bucket.dtype, device=bucket.device)
                bucket.gather(flat)
                self._island.broadcast(flat, self._place).wait()
                bucket.scatter(flat)

    def share_optimizers(self, watch: OptimizerWatch) -> None:
        """The same for the states of the optimizers, without which the next updates would differ.

        Raises:
            RuntimeError: a rank is gone.
        """
        if self._place is None:
            return
        leads = self._place == self._island.rank
        told = self._island.tell(watch.states() if leads else {})
        if not leads:
            watch.load_states(told[self._place])
