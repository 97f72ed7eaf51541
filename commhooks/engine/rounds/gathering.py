"""Flat vectors that the ranks of an island fill together, each with its own share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from commhooks.engine.guards.process_exit import landing
from commhooks.engine.network.communicator import Communicator
from commhooks.engine.rules import Rules
from commhooks.engine.vectors.buckets import Bucket
from commhooks.engine.vectors.devices import catch_up_with_callbacks

__all__ = ["Gathering", "offer"]


def offer(bucket: Bucket, rules: Rules) -> None:
    """Write b of x <- c x + b, what ``mix`` makes of zeros, to this rank's share of ``common``.

    The vectors stay as they are. No scratch is used, since this may run beside other rules.
    """
    assert bucket.common is not None
    begin = bucket.start
    with torch.no_grad(), record_function("commhooks::offer"):
        for vectors in bucket.slices:
            wire = vectors["wire"].clone()
            offered = bucket.common[begin : begin + len(wire)]
            rules.mix(x=offered.zero_(), **{**vectors, "wire": wire})
            begin += len(wire)


class Gathering:
    """Flat vectors on their way to hold the shares of all ranks of an island. Collective.

    Every share is broadcast by its own; gloo takes several times as long for an all-gather.

    Args:
        island: the ranks; the number of a share is that of its rank.
        buckets: how the vectors are shared out.
        flats: one a bucket, of its length, in which this rank's share holds what it has.

    Attributes:
        outdated: whether what it was started for has been replaced by something else.
    """

    def __init__(
        self, island: Communicator, buckets: Sequence[Bucket], flats: Sequence[Tensor]
    ) -> None:
        self.outdated = False
        self._devices = {bucket.device for bucket in buckets}
        with record_function("commhooks::gather"):
            self._futures = [
                island.broadcast(flat[start:stop], owner).then(landing(_value))
                for bucket, flat in zip(buckets, flats, strict=True)
                for owner, (start, stop) in enumerate(pairwise(bucket.edges))
                if start < stop
            ]

    @property
    def in_flight(self) -> bool:
        """Whether a share has not come yet."""
        return not all(future.done() for future in self._futures)

    def wait(self) -> None:
        """Wait until the vectors are full.

        Raises:
            RuntimeError: the communication failed; the vectors may hold anything then.
        """
        with record_function("commhooks::wait for the island"):
            for future in self._futures:
                future.wait()
            for device in self._devices:
                catch_up_with_callbacks(device)


def _value(future: torch.futures.Future[Any]) -> Any:
    return future.value()
