"""The consensus model: the mean over ranks of their local models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from commhooks.engine.guards.interrupts import uninterrupted
from commhooks.engine.meter import Meter
from commhooks.engine.network.communicator import Communicator
from commhooks.engine.network.links import Links
from commhooks.engine.network.roll_call import RollCall
from commhooks.engine.rounds.gathering import Gathering
from commhooks.engine.vectors.buckets import Bucket
from commhooks.engine.vectors.buffers import Buffer, BufferExchange, common, digest
from commhooks.engine.vectors.devices import Moment, catch_up_with_callbacks, finiteness
from commhooks.errors import RoundError

__all__ = ["Consensus", "enter"]


def enter(
    what: str,
    buckets: Sequence[Bucket],
    buffers: Callable[[], Sequence[Buffer]],
    refusal: str | None,
    links: Links,
    call: RollCall,
    meter: Meter,
) -> Consensus:
    """Put the consensus model in place. Collective; nothing else may be in flight.

    The ranks meet twice: before anything is sent, and when it is in place. What goes wrong on one
    of them in between is an error on all of them.

    Args:
        what: the call that asks for it.
        buckets: the parameters; none if they are the same on all ranks.
        buffers: finds the buffers.
        refusal: why this rank cannot take part, if it cannot.
        links: the ranks.
        call: how they meet.
        meter: where bytes and seconds are counted.

    Raises:
        RoundError: the ranks are not at the same point, one of them cannot take part, or the
            communication failed; the models are as they were.
    """
    consensus = Consensus(links)
    mine: Sequence[Buffer] = ()
    probes: list[Tensor] = []
    try:
        mine = buffers()
        # Not of the buffers, where -inf may be meant, as in a mask.
        probes = [finiteness(chunk.x) for bucket in buckets for chunk in bucket.gathered()]
        consensus.take_parameters(buckets)
        consensus.take_buffers(mine, call.device)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must be told
        refusal = refusal or f"{type(error).__name__}: {error}"
    if not call(what, refusal, probes, digest(mine)):
        consensus.take_buffers(_common(what, mine, links.everyone, call), call.device)
    began = Moment(call.device)
    links.busy()
    try:
        meter.bytes_reduced += consensus.exchange()
    except RuntimeError as error:
        call.fail(f"{what}: {error}")
    links.idle()
    ended = Moment(call.device)
    meter.communication(began, ended, began, ended)
    try:
        consensus.put_in_place()
    except Exception as error:  # noqa: BLE001 - as above
        refusal = f"{type(error).__name__}: {error}"
    try:
        call(what, refusal)
    except RoundError:
        consensus.leave()
        raise
    return consensus


def _common(
    what: str, mine: Sequence[Buffer], communicator: Communicator, call: RollCall
) -> list[Buffer]:
    """The buffers that all ranks have alike. Collective.

    Raises:
        RoundError: some differ that cannot be passed over.
    """
    everyone = call.tell(what, {buffer.name: buffer.describe() for buffer in mine})
    alike, problems = common(everyone, communicator.ranks)
    if problems:
        raise call.error(
            f"the ranks have different buffers: {'; '.join(problems)}. Give every rank the same "
            "ones, or register what is made anew with persistent=False.",
            passing=True,
        )
    return [buffer for buffer in mine if buffer.name in alike]


class Consensus:
    """Replaces parameters and buffers by what all ranks hold in common, and puts them back.

    Args:
        links: the ranks.
    """

    def __init__(self, links: Links) -> None:
        self._links = links
        self._buckets: list[Bucket] = []
        self._flats: list[Tensor] = []
        self._swapped: list[tuple[Bucket, Tensor]] = []
        self._buffers: BufferExchange | None = None

    def take_parameters(self, buckets: Sequence[Bucket]) -> None:
        """Copy the parameters."""
        self._buckets = list(buckets)
        with torch.no_grad():
            for bucket in self._buckets:
                flat = torch.empty(bucket.numel, dtype=bucket.dtype, device=bucket.device)
                bucket.gather(flat)
                # Divided before the sum, which then overflows where a number does.
                flat[bucket.start : bucket.stop].mul_(1.0 / self._links.peers.size)
                self._flats.append(flat)

    def take_buffers(self, buffers: Sequence[Buffer], device: torch.device) -> None:
        """Copy the buffers that take part."""
        self._buffers = BufferExchange(buffers, device, self._links.everyone.size)

    def exchange(self) -> int:
        """Send, and wait for what the others send. Collective; nothing has changed afterwards.

        Returns:
            The number of bytes that were sent.

        Raises:
            RuntimeError: the communication failed.
        """
        assert self._buffers is not None
        everyone, peers, island = self._links.everyone, self._links.peers, self._links.island
        if everyone.size == 1:
            return 0
        shares = [
            flat[bucket.start : bucket.stop]
            for bucket, flat in zip(self._buckets, self._flats, strict=True)
            if bucket.length
        ]
        with record_function("commhooks::consensus"):
            futures: list[torch.futures.Future[Any]] = [
                *map(peers.all_reduce, shares),
                *map(everyone.all_reduce, filter(Tensor.numel, self._buffers.sums.values())),
            ]
            if self._buffers.first.numel():
                futures.append(everyone.broadcast(self._buffers.first))
            for future in futures:
                future.wait()
            for bucket in self._buckets:
                catch_up_with_callbacks(bucket.device)
            if island is not None and any(bucket.shared for bucket in self._buckets):
                Gathering(island, self._buckets, self._flats).wait()
        return sum(bucket.nbytes for bucket in self._buckets) + self._buffers.nbytes

    def put_in_place(self) -> None:
        """Replace the numbers; if it fails, nothing has changed."""
        assert self._buffers is not None
        try:
            with torch.no_grad():
                for bucket, flat in zip(self._buckets, self._flats, strict=True):
                    bucket.swap(flat)
                    self._swapped.append((bucket, flat))
            self._buffers.replace()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Put this rank's own numbers back, bit for bit."""
        with uninterrupted(), torch.no_grad():
            while self._swapped:
                bucket, flat = self._swapped.pop()
                bucket.swap(flat)
            if self._buffers is not None:
                self._buffers.put_back()
