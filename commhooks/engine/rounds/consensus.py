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
from commhooks.engine.network.ticket import Ticket
from commhooks.engine.rounds.gathering import Gathering
from commhooks.engine.vectors.bits import combined
from commhooks.engine.vectors.buckets import Bucket
from commhooks.engine.vectors.buffers import Exchange, Replaced, common, digest, write
from commhooks.engine.vectors.devices import Moment, catch_up_with_callbacks, finiteness
from commhooks.engine.vectors.frozen import Held, Unlike
from commhooks.engine.vectors.spectral import SpectralPair
from commhooks.errors import RoundError

__all__ = ["Consensus", "enter"]


def enter(
    what: str,
    buckets: Sequence[Bucket],
    hold: Callable[[], Held],
    refusal: str | None,
    links: Links,
    call: RollCall,
    meter: Meter,
    *,
    drifted: bool,
) -> Consensus | Ticket:
    """Put the consensus model in place. Collective; nothing else may be in flight.

    The ranks meet twice: before anything is sent, and when it is in place. What goes wrong on one
    of them in between is an error on all of them.

    Args:
        what: the call that asks for it.
        buckets: the parameters.
        drifted: whether this rank knows that they differ between the ranks. If no rank does, they
            are compared, and sent only where they do.
        hold: finds what else there is: buffers, frozen parameters.
        refusal: why this rank cannot take part, if it cannot.
        links: the ranks.
        call: how they meet.
        meter: where bytes and seconds are counted.

    Returns:
        The consensus; or, where other ranks are at something that this one has to take part in
        before it enters anew, the ticket that says so.

    Raises:
        RoundError: the ranks are not at the same point, one of them cannot take part, or the
            communication failed; the models are as they were.
    """
    consensus = Consensus(links)
    mine = Held()
    probes: list[Tensor] = []
    bits: int | None = None
    try:
        mine = hold()
        # Not of the buffers, where -inf may be meant, as in a mask.
        probes = [finiteness(chunk.x) for bucket in buckets for chunk in bucket.gathered()]
        if drifted:
            consensus.take_parameters(buckets)
        else:
            bits = combined(bucket.ordered_fingerprint() for bucket in buckets)
        consensus.take_held(mine._replace(frozen=()), call.device)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must be told
        refusal = refusal or f"{type(error).__name__}: {error}"
    ticket = call(what, refusal, probes, digest((*mine.buffers, *mine.frozen), bits))
    verdict = ticket.wait()
    if verdict.joined is not None:
        return ticket
    consensus.step = verdict.step
    if not verdict.alike:
        alike, consensus.unlike, apart = _common(what, mine, bits, links, call)
        try:
            if apart and not drifted:
                consensus.take_parameters(buckets)
            consensus.take_held(alike, call.device)
        except Exception as error:  # noqa: BLE001 - as above
            refusal = f"{type(error).__name__}: {error}"
        call(what, refusal)
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
        meter.bytes_reduced += consensus.fit(call.device)
    except RuntimeError as error:
        consensus.leave()
        call.fail(f"{what}: {error}")
    try:
        call(what, refusal)
    except RoundError:
        consensus.leave()
        raise
    return consensus


def _common(
    what: str, mine: Held, bits: int | None, links: Links, call: RollCall
) -> tuple[Held, Unlike, bool]:
    """What all ranks have alike, but for its numbers. Collective.

    Returns:
        The buffers that they all have, and the frozen parameters whose numbers differ; the names of
        the latter, and of those that cannot be exchanged; and whether the trained ones differ.

    Raises:
        RoundError: some buffers differ that cannot be passed over.
    """
    everyone = links.everyone
    described = tuple(
        {each.name: each.describe() for each in some} for some in (mine.buffers, mine.frozen)
    )
    told = call.tell(what, (*described, bits))
    buffers, frozen, bits_of = zip(*told, strict=True)
    alike, problems = common(buffers, everyone.ranks)
    if problems:
        raise call.error(
            f"the ranks have different buffers: {'; '.join(problems)}. Give every rank the same "
            "ones, or register what is made anew with persistent=False.",
            passing=True,
        )
    unlike = Unlike.of(frozen, links.teams)
    held = mine._replace(
        buffers=[buffer for buffer in mine.buffers if buffer.name in alike],
        frozen=[each for each in mine.frozen if each.name in unlike.bits],
    )
    return held, unlike, None in bits_of or links.peers_differ(bits_of)


class Consensus:
    """Replaces parameters and the like by what all ranks hold in common, and puts them back.

    Args:
        links: the ranks.

    Attributes:
        step: the last that any rank has made.
        unlike: the frozen parameters that differed.
    """

    def __init__(self, links: Links) -> None:
        self._links = links
        self.step = 0
        self._buckets: list[Bucket] = []
        self._flats: list[Tensor] = []
        self._swapped: list[tuple[Bucket, Tensor]] = []
        self._exchanges: list[tuple[Communicator, Exchange]] = []
        self._spectral: Sequence[SpectralPair] = ()
        self.unlike = Unlike([], [])

    @property
    def averages_parameters(self) -> bool:
        """Whether the parameters take part."""
        return bool(self._flats)

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

    def take_held(self, held: Held, device: torch.device) -> None:
        """Copy what is to be replaced besides the parameters."""
        everyone, peers = self._links.everyone, self._links.peers
        shared: list[Replaced] = [*held.buffers, *(f for f in held.frozen if not f.sharded)]
        shards = [each for each in held.frozen if each.sharded]
        self._exchanges = [
            (everyone, Exchange(shared, device, everyone.size)),
            (peers, Exchange(shards, device, peers.size)),
        ]
        # DDP would have the first rank's u and v where no weight is an average.
        taken = {id(buffer.tensor) for buffer in held.buffers} if self._buckets else set()
        self._spectral = [pair for pair in held.spectral if {id(pair.u), id(pair.v)} <= taken]

    def exchange(self) -> int:
        """Send, and wait for what the others send. Collective; nothing has changed afterwards.

        Returns:
            The number of bytes that were sent.

        Raises:
            RuntimeError: the communication failed.
        """
        peers, island = self._links.peers, self._links.island
        if self._links.everyone.size == 1:
            return 0
        shares = [
            flat[bucket.start : bucket.stop]
            for bucket, flat in zip(self._buckets, self._flats, strict=True)
            if bucket.length
        ]
        with record_function("commhooks::consensus"):
            futures: list[torch.futures.Future[Any]] = [*map(peers.all_reduce, shares)]
            for ranks, held in self._exchanges:
                futures += map(ranks.all_reduce, filter(Tensor.numel, held.sums.values()))
                if held.first.numel():
                    futures.append(ranks.broadcast(held.first))
            for future in futures:
                future.wait()
            for bucket in self._buckets:
                catch_up_with_callbacks(bucket.device)
            if island is not None and any(bucket.shared for bucket in self._buckets):
                Gathering(island, self._buckets, self._flats).wait()
        held_bytes = sum(held.nbytes for _, held in self._exchanges)
        return sum(bucket.nbytes for bucket in self._buckets) + held_bytes

    def put_in_place(self) -> None:
        """Replace the numbers; if it fails, nothing has changed."""
        try:
            with torch.no_grad():
                for bucket, flat in zip(self._buckets, self._flats, strict=True):
                    bucket.swap(flat)
                    self._swapped.append((bucket, flat))
            for _, held in self._exchanges:
                held.replace()
            if self._links.everyone.rank == 0:
                for pair in self._spectral:
                    pair.fit()
        except BaseException:
            self.leave()
            raise

    def fit(self, device: torch.device) -> int:
        """Take what the first rank has made to fit the weights. Collective, also after a failure.

        Other ranks could have other last bits, since libraries choose by processor and threads.

        Returns:
            The number of bytes that were sent.

        Raises:
            RuntimeError: the communication failed.
        """
        if not self._spectral or self._links.everyone.size == 1:
            return 0
        tensors = [tensor for pair in self._spectral for tensor in (pair.u, pair.v)]
        flat = torch.cat([tensor.to(device, torch.float64) for tensor in tensors])
        self._links.everyone.broadcast(flat).wait()
        catch_up_with_callbacks(device)
        for tensor, part in zip(
            tensors, torch.split(flat, [len(tensor) for tensor in tensors]), strict=True
        ):
            write(tensor, part)
        return flat.numel() * flat.element_size()

    def leave(self) -> None:
        """Put this rank's own numbers back, bit for bit."""
        with uninterrupted(), torch.no_grad():
            while self._swapped:
                bucket, flat = self._swapped.pop()
                bucket.swap(flat)
            for _, held in self._exchanges:
                held.put_back()
