"""One parameter all-reduce with what is chained to it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from commhooks.engine.guards.interrupts import uninterrupted
from commhooks.engine.guards.process_exit import landing
from commhooks.engine.network.links import Links
from commhooks.engine.network.report import Report
from commhooks.engine.network.ticket import Point, Ticket
from commhooks.engine.network.wires import Wire
from commhooks.engine.rounds.drift import Drift
from commhooks.engine.rounds.gathering import offer
from commhooks.engine.rules import Kept, Rules
from commhooks.engine.vectors.buckets import Bucket
from commhooks.engine.vectors.devices import (
    HostCopy,
    Moment,
    catch_up_with_callbacks,
    keep_for_this_stream,
    side_stream,
)

__all__ = ["Round"]


class Round:
    """What a fragment's wires send, and the rules' ``chain`` after each.

    Attributes:
        launched, arrived: when the first collective was started and the last chain had run.
        failed_alone: whether the rules have failed on this rank, which no other knows of.

    Args:
        point: what the ranks must agree on; its number is the round's.
        device: where tickets are made out.
        buckets: the model, with the vectors filled by ``contribute``.
        wires: one a bucket, which have encoded them.
        links: where the ticket goes.
        rules: what is chained.
        kept: what the rules' ``arrive`` is called with, after the last chain; None for no call.
        probes: scalars that are NaN or inf if this rank's parameters are.
        refusal: why this rank cannot take part; it then sends its ticket alone.
        fingerprint: a number that the ranks of an island have in common if their parameters are the
            same.
        report: what this rank tells the others.
        drifts: one a bucket, which have taken note of the launch.
        joined: the ticket that this rank has sent from a call, if the others are ahead of it.
        prepare: starts what must have ended before the rules' first ``chain``, if there is
            anything.
    """

    def __init__(
        self,
        point: Point,
        device: torch.device,
        buckets: Sequence[Bucket],
        wires: Sequence[Wire],
        links: Links,
        rules: Rules,
        kept: Kept | None,
        probes: Sequence[Tensor],
        *,
        refusal: str | None = None,
        fingerprint: int | Tensor = 0,
        report: Report,
        drifts: Sequence[Drift],
        prepare: Callable[[], torch.futures.Future[Any] | None] = lambda: None,
        joined: Ticket | None = None,
    ) -> None:
        self.number = point.number
        self._together: list[HostCopy] = []
        self._links = links
        self._rules = rules
        self._kept = kept
        self._buckets = buckets
        self._failures: list[str] = []
        self.failed_alone = False
        self._futures: list[torch.futures.Future[Tensor]] = []
        self._second_shots: deque[tuple[Bucket, Drift, Wire, torch.futures.Future[Any]]] = deque()
        self._device = device
        self.launched = self.arrived = Moment(device)
        self._ticket = joined
        self._prepared: torch.futures.Future[Any] | None = None
        try:
            with record_function("commhooks::launch"):
                if refusal is not None:
                    # Before the ticket that says so, and not told when asked for: a rank of another
                    # island may have to wait for one that never comes to this round's landing.
                    links.everyone.post(f"round {self.number}", refusal)
                self._ticket = self._ticket or Ticket(
                    links.everyone,
                    device,
                    point,
                    probes=probes,
                    refused=refusal is not None,
                    digest=fingerprint,
                    report=report,
                )
                if refusal is None:
                    self._prepared = prepare()
                parts = zip(buckets, wires, drifts, strict=True) if refusal is None else ()
                for bucket, wire, drift in parts:
                    # Of some buckets this rank may have no share, and neither have its peers.
                    if not bucket.length:
                        continue
                    first = wire.launch()
                    if wire.two_shots:
                        self._second_shots.append((bucket, drift, wire, first))
                    else:
                        self._chain(first, bucket, drift)
                if not self._second_shots:
                    self._let_arrive()
        except RuntimeError as error:
            # Raised by `wait`, like every other failure, before anything is mixed.
            self._failures.append(str(error))

    def proceed(self, *, wait: bool = False) -> bool:
        """Start the second shots that can be started. On the training thread, round after round.

        Args:
            wait: whether to wait for the first ones.

        Returns:
            Whether all have been started, or never will be.
        """
        try:
            while self._second_shots and not self._failures:
                bucket, drift, wire, first = self._second_shots[0]
                if wait:
                    if self._verdict() is not None:
                        break
                    first.wait()
                elif not (first.done() and self._is_trusted()):
                    return False
                with uninterrupted(), side_stream(self._device):
                    first.wait()
                    self._chain(wire.send_back(), bucket, drift)
                    self._second_shots.popleft()
                    if not self._second_shots:
                        self._let_arrive()
        except Exception as error:  # noqa: BLE001 - a backend may raise anything
            self._failures.append(str(error))
        return True

    @property
    def done(self) -> bool:
        """Whether the result, chained update included, has arrived (or the round has failed)."""
        ended = all(future.done() for future in self._futures) and self.arrived.passed
        return ended and not self._second_shots

    @property
    def arrived_well(self) -> bool:
        """Whether the result has arrived, and nothing speaks against it so far."""
        with suppress(RuntimeError):
            return self.done and not self._failures and self._is_trusted()
        return False

    def wait(self) -> str | None:
        """Wait for every bucket; the cause of the failure, if the round has failed."""
        with record_function("commhooks::wait"):
            try:
                refusal = self._verdict()
            except Exception as error:  # noqa: BLE001 - a backend may raise anything
                refusal = str(error)
            if refusal is not None:
                # The payloads may never arrive, or may be paired with something else.
                self._failures.insert(0, refusal)
                return refusal
            self.proceed(wait=True)
            for future in self._futures:
                try:
                    future.wait()
                except Exception as error:  # noqa: BLE001 - a backend may raise anything
                    self._failures.append(str(error))
            catch_up_with_callbacks(self._device)
        return self._failures[0] if self._failures else None

    @property
    def together(self) -> float:
        """The sum of :meth:`Drift.together` over the buckets, after :meth:`wait`."""
        return math.fsum(square.read().item() for square in self._together)

    @property
    def reports(self) -> Mapping[int, Sequence[float]]:
        """What the ranks have told, after :meth:`wait`."""
        return {} if self._ticket is None else self._ticket.wait().reports

    def _verdict(self) -> str | None:
        """What the tickets say against the payload, once they have come."""
        if self._ticket is None:
            return None
        verdict = self._ticket.wait()
        if verdict.problem is None and verdict.refused:
            return self._links.everyone.read(f"round {self.number}", verdict.refused)
        return verdict.problem or self._links.apart(verdict.digests)

    def _is_trusted(self) -> bool:
        return self._ticket is not None and self._ticket.done and self._verdict() is None

    @contextmanager
    def _noting_failures(self, *, alone: bool = False) -> Iterator[None]:
        """Note what the block raises; a future would wrap it in C++ stack frames."""
        try:
            yield
        except Exception as error:
            self._failures.append(str(error))
            self.failed_alone |= alone
            raise

    def _chain(self, mean: torch.futures.Future[Any], bucket: Bucket, drift: Drift) -> None:
        if self._prepared is not None:
            mean = torch.futures.collect_all([self._prepared, mean])
        self._futures.append(mean.then(landing(self._chained_to(bucket, drift))))

    def _let_arrive(self) -> None:
        if self._kept is not None and self._futures:
            together = torch.futures.collect_all(self._futures)
            self._futures.append(together.then(landing(self._arrival_of(self._kept))))

    def _arrival_of(self, kept: Kept) -> Callable[[torch.futures.Future[Any]], Tensor]:
        def arrive(together: torch.futures.Future[Any]) -> Tensor:
            """Runs on the backend's thread when the last chained update has ended."""
            with self._noting_failures():
                values: list[Tensor] = [each.value() for each in together.value()]
            with self._noting_failures(alone=True), record_function("commhooks::arrive"):
                self._rules.arrive(kept)
                for bucket in self._buckets:
                    if bucket.ahead:
                        offer(bucket, self._rules)
            self.arrived = Moment(self._device)
            keep_for_this_stream(each for bucket in self._buckets for each in bucket.memory)
            return values[0]

        return arrive

    def _chained_to(
        self, bucket: Bucket, drift: Drift
    ) -> Callable[[torch.futures.Future[Any]], Tensor]:
        def chain(reduced: torch.futures.Future[Any]) -> Tensor:
            """Runs on the backend's thread when the all-reduce ends."""
            wire = bucket.vectors["wire"]
            with self._noting_failures():
                value = reduced.value()
                for each in value if self._prepared is not None else ():
                    each.wait()
            with self._noting_failures(alone=True), record_function("commhooks::chain"):
                self._together.append(drift.together())
                for vectors in bucket.slices:
                    self._rules.chain(**vectors)
                if bucket.ahead and self._kept is None:
                    offer(bucket, self._rules)
            self.arrived = Moment(wire.device)
            keep_for_this_stream(bucket.memory)
            # A CUDA future records the tensors it holds on the streams that wait for it.
            return wire

        return chain
