"""Whose parameters are an island's, while some of its ranks are out of batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from commhooks.engine.network.communicator import Communicator
from commhooks.engine.steps.optimizers import OptimizerWatch
from commhooks.engine.vectors.buckets import Bucket
from commhooks.engine.vectors.devices import catch_up_with_callbacks

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
        self._behind = False

    @property
    def needed(self) -> bool:
        """Whether a rank is behind the others."""
        return self._place is not None

    def note(self, trains: Mapping[int, bool]) -> None:
        """Take note of which ranks have a batch for the step under way, by their numbers."""
        of_island = [trains[rank] for rank in self._island.ranks]
        if all(of_island):
            self.forget()
        elif any(of_island):
            self._place = of_island.index(True)
            self._behind = not of_island[self._island.rank]

    def forget(self) -> None:
        """All ranks are at one point."""
        self._place, self._behind = None, False

    def share_parameters(self, buckets: Sequence[Bucket]) -> None:
        """Give its parameters to those that are behind. Collective in the island.

        Raises:
            RuntimeError: a rank is gone.
        """
        assert self._place is not None
        with torch.no_grad():
            for bucket in buckets:
                flat = torch.empty(bucket.numel, dtype=bucket.dtype, device=bucket.device)
                bucket.gather(flat)
                self._broadcast(flat)
                # The others may be in the middle of a backward, which needs its parameters.
                if self._behind:
                    bucket.scatter(flat)

    def share_optimizers(self, watch: OptimizerWatch, device: torch.device) -> None:
        """The same for the states of the optimizers, without which the next updates would differ.

        Args:
            watch: knows them.
            device: what the island's group can send from.

        Raises:
            RuntimeError: a rank is gone.
        """
        assert self._place is not None
        states = watch.states() if self._place == self._island.rank else None
        # Every rank hears what every other tells, so the tensors themselves are sent by one.
        told = self._island.tell(tree_map(_outline, states))[self._place]
        leaves, shape = tree_flatten(told)
        mine = iter(tree_leaves(states))
        for number, leaf in enumerate(leaves):
            own = next(mine, None)
            if isinstance(leaf, _Outline):
                room = torch.empty(leaf.shape, dtype=leaf.dtype, device=device)
                sent = own.to(device).contiguous() if isinstance(own, Tensor) else room
                self._broadcast(sent)
                leaves[number] = sent.cpu() if leaf.on_cpu else sent
        if self._behind:
            watch.load_states(tree_unflatten(leaves, shape))

    def _broadcast(self, tensor: Tensor) -> None:
        assert self._place is not None
        self._island.broadcast(tensor, self._place).wait()
        catch_up_with_callbacks(tensor.device)


@dataclass(frozen=True)
class _Outline:
    """What a tensor looks like."""

    shape: torch.Size
    dtype: torch.dtype
    on_cpu: bool


def _outline(leaf: object) -> object:
    if isinstance(leaf, Tensor):
        return _Outline(leaf.shape, leaf.dtype, leaf.device.type == "cpu")
    return leaf
