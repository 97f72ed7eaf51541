"""The rounds of one registered state: what happens at a step, a boundary, an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from commhooks.engine.checkpoint import check_shapes, dump_vectors, load_vectors, shapes
from commhooks.engine.guards.interrupts import uninterrupted
from commhooks.engine.guards.refused_backward import raise_after_backward
from commhooks.engine.meter import Meter
from commhooks.engine.network.communicator import Communicator, done
from commhooks.engine.network.gradients import GradientAverager
from commhooks.engine.network.ticket import total
from commhooks.engine.rounds.consensus import Consensus
from commhooks.engine.rounds.round import Round
from commhooks.engine.rounds.schedule import Schedule
from commhooks.engine.rules import Rules
from commhooks.engine.vectors.buckets import build_buckets
from commhooks.engine.vectors.devices import HostCopy, Moment
from commhooks.errors import RegistrationError, RoundError
from commhooks.stats import Stats

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

__all__ = ["Engine"]


_outside_inference_mode = torch.inference_mode(mode=False)
"""For what is called around evaluations: a tensor made in inference mode cannot be trained with."""


class Engine:
    """Runs the rules of one algorithm over the parameters of one model.

    Args:
        rules: the algorithm.
        parent: the ranks that train together.
        warmup_steps: steps before the local ones.
        cap_bytes: size of a bucket.
    """

    def __init__(
        self,
        rules: Rules,
        parent: dist.ProcessGroup,
        warmup_steps: int,
        cap_bytes: float,
    ) -> None:
        self.communicator = Communicator(parent)
        rules.resolve(self.communicator.size)
        self.schedule = Schedule(tau=rules.tau, origin=warmup_steps)
        self.disabled = False
        self._rules = rules
        self._cap_bytes = cap_bytes
        self._meter = Meter()
        self._averager = GradientAverager(self.communicator, self._meter)
        self._buckets = build_buckets((), cap_bytes)
        self._started = False
        self._drifted = False
        self._round: Round | None = None
        # What to raise, not the error itself: its traceback would keep the model alive.
        self._failure: tuple[str, int, int, tuple[int, ...], str] | None = None
        self._consensus: Consensus | None = None
        self._probes: list[Tensor] = []
        self._squared_distance: HostCopy | None = None
        self.device = torch.device("cpu")
        self._shadowed = False

    def attach(self, parameters: Iterable[Tensor]) -> None:
        """Take hold of the parameters that DDP reduces, in the same order on every rank."""
        self._buckets = build_buckets(parameters, self._cap_bytes)
        self.device = self._buckets[0].device

    # Steps.

    @property
    def averages_gradients(self) -> bool:
        """Whether the step under way averages gradients, as plain DDP does."""
        return self.disabled or self._rules.synchronous or self.schedule.step < self.schedule.origin

    @property
    def boundary_due(self) -> bool:
        """Whether a boundary waits for the optimizers, was cut short, or has failed for good."""
        return self._due or self._left_open or self._failure is not None

    @property
    def _due(self) -> bool:
        return self.schedule.due and not (self.disabled or self._rules.synchronous)

    @property
    def _left_open(self) -> bool:
        """Whether a blocking round is in flight: interrupted, or launched for others (Join)."""
        return self._round is not None and not self._rules.overlapped

    def reduce_gradients(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Average a gradient bucket or leave it as it is; the last one of a backward ends a step.

        Inside ``averaged()`` the backward ends in a RegistrationError and is no step.
        """
        if self._consensus is not None:
            if bucket.is_last():
                raise_after_backward(
                    RegistrationError(
                        "A backward ran inside averaged(), whose parameters are put back at its "
                        "end; train outside the block. The step is not counted; clear its "
                        "gradients before going on."
                    )
                )
            return done(bucket.buffer())
        averaging = self.averages_gradients
        gradient = self._averager.average(bucket) if averaging else done(bucket.buffer())
        if bucket.is_last():
            if not averaging and not self._started:
                # Now, since what comes next may be an optimizer already in its step, whose closure
                # this backward is part of.
                self._start()
            if not self._shadowed:
                self._count_step(local=not averaging)
            self._shadowed = False
        return gradient

    def shadow_step(self) -> None:
        """Take part in a step of ranks with more batches (torch's Join), ahead of DDP's part.

        The others have collectives of DDP to get through before they wait for a round of this
        step, so it is waited for at the next one: these parameters do not change in between.

        While gradients are averaged, DDP's own shadowing calls the hook and so counts the step.

        Raises:
            RoundError: a round failed.
        """
        if not self.averages_gradients:
            self._count_step(local=True)
            self._shadowed = True
            self.at_boundary(wait=False)

    def end_shadowing(self) -> None:
        """Every rank is out of batches."""
        self._shadowed = False

    def at_boundary(self, *, wait: bool = True) -> None:
        """Run the boundaries that are due.

        Args:
            wait: whether a round that is not overlapped has to be through at the end.

        Raises:
            RoundError: a round failed, now or before.
        """
        if self._left_open or self._failure is not None:
            self.drain()
        while self._due:
            if not self._started:
                self._start()
            self.drain()
            with uninterrupted():
                self._sweep(*(("mix", "contribute") if self._rules.overlapped else ("contribute",)))
                self._launch()
                self.schedule.boundaries += 1
            if wait and not self._rules.overlapped:
                self.drain()

    def drain(self) -> None:
        """Wait for the round in flight, if there is one, and its chained update.

        An overlapped round is mixed in at the next boundary, any other one now.

        Raises:
            RoundError: it failed.
        """
        if self._failure is not None:
            raise RoundError(*self._failure)
        if self._round is None:
            return
        finished = self._round
        began = Moment(self.device)
        # Ctrl-C may end the wait, and the round is waited for again by whatever comes next.
        cause = finished.wait()
        with uninterrupted():
            self._round = None
            if cause is not None:
                self._fail(finished.number, cause)
            self._meter.rounds_used += 1
            self._meter.communication(
                finished.launched, finished.arrived, began, Moment(self.device)
            )
            if not self._rules.overlapped:
                self._sweep("mix")

    # The consensus model.

    @_outside_inference_mode
    def enter_consensus(self, buffers: Iterable[Tensor]) -> bool:
        """Put the mean of the models in place; False inside another ``averaged()``.

        Raises:
            RoundError: a round failed, or the averaging did; the models are as they were.
        """
        if self._consensus is not None:
            return False
        self.at_boundary()
        self.drain()
        # Before the first local step the parameters are the same on every rank, bit for bit.
        buckets = self._buckets if self._drifted else []
        self._consensus = Consensus(buckets, list(buffers), self._cap_bytes)
        try:
            self._consensus.enter(self.communicator, self._meter, self.device)
        except BaseException as error:
            self._consensus = None
            if not isinstance(error, Exception):
                raise
            self._fail(self._meter.rounds_launched, f"averaging the models: {error}")
        return True

    def leave_consensus(self) -> None:
        """Put this rank's own model back."""
        if self._consensus is not None:
            self._consensus.leave()
            self._consensus = None

    def finish(self, buffers: Iterable[Tensor]) -> None:
        """Drain, end on the consensus model, and begin anew from it if training goes on.

        Raises:
            RegistrationError: inside ``averaged()``.
            RoundError: a round failed, or the averaging did; the models are as they were.
        """
        if not self.enter_consensus(buffers):
            raise RegistrationError("finish() was called inside averaged(); leave the block first.")
        self._consensus = None
        self._started = False
        self.schedule.restart()

    def disable(self) -> None:
        """Average gradients from the next step on, after :meth:`finish`, and keep no vectors."""
        self.disabled = True
        for bucket in self._buckets:
            bucket.release()

    # Reports and checkpoints.

    def stats(self) -> Stats:
        """The counters now."""
        self._averager.settle()
        meter = self._meter
        meter.settle(wait=True)
        hidden, arrived = meter.seconds_hidden, False
        if self._round is not None and self._round.done:
            # Whether it is waited for at a boundary or by an evaluation, it was hidden until now.
            arrived = True
            hidden += max(0.0, self._round.arrived.seconds_since(self._round.launched))
        square = 0.0 if self._squared_distance is None else self._squared_distance.read().item()
        return Stats(
            step=self.schedule.step,
            rounds_launched=meter.rounds_launched,
            rounds_completed=meter.rounds_used + arrived,
            bytes_reduced=meter.bytes_reduced,
            seconds_exposed=meter.seconds_exposed,
            seconds_hidden=hidden,
            consensus_distance=math.sqrt(square),
        )

    @_outside_inference_mode
    def state_dict(self) -> dict[str, Any]:
        """Counters and vectors; waits for the round in flight.

        Raises:
            RegistrationError: inside ``averaged()``.
            RoundError: a round failed.
        """
        if self._consensus is not None:
            raise RegistrationError(
                "state_dict() was called inside averaged(), where the parameters are not this "
                "rank's own; leave the block first."
            )
        self.at_boundary()
        self.drain()
        self._meter.settle(wait=True)
        names = self._kept if self._started else ()
        return {
            "schedule": asdict(self.schedule),
            "meter": asdict(self._meter),
            "started": self._started,
            "drifted": self._drifted,
            "disabled": self.disabled,
            "shapes": shapes(self._buckets),
            "vectors": dump_vectors(self._buckets, names),
        }

    def load_state_dict(self, saved: Mapping[str, Any], *, same_ranks: bool = True) -> bool:
        """Go on from what :meth:`state_dict` gave.

        Args:
            saved: what it gave, on this rank or, with other ``same_ranks``, on any rank.
            same_ranks: whether as many ranks go on as saved.

        Returns:
            Whether the vectors go on too. Those that belong to one rank do not fit another number
            of ranks; the algorithm then starts anew from the parameters.

        Raises:
            CheckpointError: of a model of other shapes; nothing has changed.
        """
        check_shapes(saved["shapes"], shapes(self._buckets))
        self.drain()
        go_on: bool = saved["started"] and (same_ranks or self._rules.portable)
        if go_on:
            self._allocate()
            load_vectors(self._buckets, saved["vectors"])
        self._started = go_on
        self._drifted = saved["drifted"]
        self.disabled = saved["disabled"]
        for name, value in saved["schedule"].items():
            setattr(self.schedule, name, value)
        for name, value in saved["meter"].items():
            setattr(self._meter, name, value)
        return go_on or not saved["started"]

    # Inside a boundary.

    @property
    def _kept(self) -> tuple[str, ...]:
        """The vectors that mean something between boundaries."""
        return (*self._rules.vectors, *(("wire",) if self._rules.overlapped else ()))

    def _allocate(self) -> None:
        for bucket in self._buckets:
            if not bucket.vectors:
                bucket.allocate(("wire", *self._rules.vectors))

    def _start(self) -> None:
        self._allocate()
        self._sweep("start")
        self._started = True

    def _count_step(self, *, local: bool) -> None:
        self.schedule.advance()
        # On every rank at once, whose optimizer may skip the step, since it decides what
        # averaged() sends; and for good, since optimizers keep what they saw of local gradients.
        self._drifted |= local

    def _launch(self) -> None:
        number = self._meter.rounds_launched + 1
        self._round = Round(number, self._buckets, self.communicator, self._rules, self._probes)
        self._meter.rounds_launched = number
        if self.communicator.size > 1:
            self._meter.bytes_reduced += sum(bucket.nbytes for bucket in self._buckets)

    def _sweep(self, *names: str) -> None:
        """Apply rules to the model, chunk by chunk; ``mix`` alone writes to the parameters."""
        for bucket in self._buckets:
            # It may raise, and must not once a part of the model is mixed.
            bucket.refresh()
        rules = [getattr(self._rules, name) for name in names]
        mixing = "mix" in names
        probes: list[Tensor] = []
        with torch.no_grad(), record_function(f"commhooks::{'+'.join(names)}"):
            for bucket in self._buckets:
                for chunk in bucket.gathered():
                    x, vectors = chunk.x, chunk.vectors
                    # NaN or inf anywhere in x makes either of them NaN or inf.
                    if mixing:
                        reference = vectors[self._rules.reference]
                        difference = torch.sub(x, reference, out=chunk.spare)
                        probes.append(torch.dot(difference, difference))
                    else:
                        probes.append(x.sum())
                    for rule in rules:
                        rule(x=x, **vectors)
                    if mixing:
                        chunk.write_back()
            probe = total(probes, self.device)
            if mixing:
                self._squared_distance = HostCopy(probe)
        self._probes = [probe]

    def _fail(self, number: int, cause: str) -> NoReturn:
        name, ranks = type(self._rules).__name__, tuple(self.communicator.ranks)
        self._failure = name, number, self.schedule.step, ranks, cause
        raise RoundError(*self._failure)
