"""The rounds of one registered state: what happens at a step, a boundary, an evaluation."""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from commhooks.drift import DriftTable
from commhooks.engine.advice import Advice
from commhooks.engine.guards.interrupts import uninterrupted
from commhooks.engine.guards.refused_backward import after_backward, raise_after_backward
from commhooks.engine.guards.training_thread import TrainingThread
from commhooks.engine.meter import Meter
from commhooks.engine.network.communicator import done
from commhooks.engine.network.islands import Layout
from commhooks.engine.network.links import Links
from commhooks.engine.network.others import Others
from commhooks.engine.network.report import Report
from commhooks.engine.network.roll_call import RollCall
from commhooks.engine.network.ticket import FIRST_STEP, Point, Ticket
from commhooks.engine.network.wires import wire_for
from commhooks.engine.progress import Progress
from commhooks.engine.rounds.consensus import Consensus, enter
from commhooks.engine.rounds.drift_table import drift_table
from commhooks.engine.rounds.fragment import Fragment
from commhooks.engine.rounds.round import Round
from commhooks.engine.rounds.schedule import Cycle, Schedule
from commhooks.engine.rounds.sharing import Sharing
from commhooks.engine.rules import Rules, weight_in_background
from commhooks.engine.saving import Saving, Standing
from commhooks.engine.steps.averaging import StepAverager
from commhooks.engine.steps.backward import Backwards
from commhooks.engine.steps.optimizers import OptimizerWatch
from commhooks.engine.steps.shared_updates import SharedUpdates
from commhooks.engine.steps.writes import Writes
from commhooks.engine.vectors.bits import combined
from commhooks.engine.vectors.buckets import Bucket, build_buckets
from commhooks.engine.vectors.devices import Moment
from commhooks.engine.vectors.fragments import partition
from commhooks.engine.vectors.frozen import Held
from commhooks.errors import RegistrationError, RoundError
from commhooks.periods import hides
from commhooks.stats import Stats

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

__all__ = ["Engine"]

logger = logging.getLogger("commhooks")

# A bucket's second shot can start when its first one has ended. With a few buckets a link would be
# idle, or have to gain speed again, between the shots of one and the next.
_PIPELINED = 8


_outside_inference_mode = torch.inference_mode(mode=False)
"""For what is called around evaluations: a tensor made in inference mode cannot be trained with."""


class Engine:
    """Runs the rules of one algorithm over the parameters of one model.

    Args:
        rules: the algorithm.
        parent: the ranks that train together.
        layout: which of them make one worker.
        parameters: those that DDP reduces, by name, in the same order on every rank.
        warmup_steps: steps before the local ones.
        cap_bytes: size of a bucket.
        check: says what keeps this rank from taking part in a round, if anything does.
        first_tau: steps of the first cycle.
        static_graph: whether the DDP model has that option.
        find_unused: the same of ``find_unused_parameters``.
        local: gives this rank's shard of a parameter, for a model whose island shards it; None
            where every rank has all of it.
        reshard: makes the next forward see what is written to the shards.

    Attributes:
        thread: the one that trains.
        counted: steps that were counted here, whatever a checkpoint says of others.
    """

    def __init__(
        self,
        rules: Rules,
        parent: dist.ProcessGroup,
        layout: Layout,
        parameters: Mapping[str, Tensor],
        warmup_steps: int,
        cap_bytes: float,
        check: Callable[[], str | None] = lambda: None,
        *,
        first_tau: int,
        static_graph: bool = False,
        find_unused: bool = False,
        local: Callable[[Tensor], Tensor] | None = None,
        reshard: Callable[[], None] = lambda: None,
    ) -> None:
        self.thread = TrainingThread()
        self.counted = 0
        # A state holds its engine; a cycle would keep dropped states, and their groups, for long.
        self._rules_alive = weakref.ref(rules)
        self._check = check
        self._finds_unused = find_unused
        self._reshard = reshard
        self._sharded = local is not None
        self.layout = layout
        compressed = rules.compression is not None and layout.m > 1
        rules.resolve(layout.m)
        self.links = Links(
            parent,
            self,
            layout,
            two_shots=compressed,
            background=not self._sharded and weight_in_background(rules) is not None,
        )
        self._sending: deque[Round] = deque()
        standing = self._standing = Standing(step=0, origin=warmup_steps)
        self._meter = Meter()
        alive = weakref.ref(self)

        def in_island() -> bool:
            engine = alive()
            return engine is not None and not engine.averages_gradients

        self._call = RollCall(
            type(rules).__name__, self.links, self._meter, lambda: standing.step, in_island
        )
        self._backwards = Backwards(parameters.values(), static_graph=static_graph)
        # By their whole sizes, so that all ranks deal them out alike.
        parts = partition(parameters, rules.fragments)
        mine = {name: local(p) if local is not None else p for name, p in parameters.items()}
        self._names = {id(mine[name]): name for part in parts for name in part}
        dealt = [[mine[name] for name in part] for part in parts]
        # A sharded model is shared out already.
        shares = (1, 0) if self._sharded else (layout.size, layout.place)
        cap = cap_bytes / _PIPELINED if compressed else cap_bytes
        ahead = self.links.shares is not None
        # Of these alone, since what holds the engine would close a cycle.
        make_wire = partial(
            wire_for,
            self.links,
            rules.compression,
            differences=rules.contributes_differences,
        )
        self.writes = Writes(list(parameters.values()), list(mine.values()))
        self._fragments = [
            Fragment(
                part,
                build_buckets(part, cap, *shares, cuttable=rules.elementwise, ahead=ahead),
                Schedule(None if rules.overlapped else rules.delay),
                make_wire,
                1 if compressed else layout.m,
            )
            for part in dealt
        ]
        self._cycle = Cycle([each.schedule for each in self._fragments], first_tau)
        self._advice = Advice(
            self,
            type(rules).__name__,
            self._call,
            None if rules.overlapped else rules.delay,
            adapts=hides(rules.tau),
            speaks=self.speaks,
        )
        self.others = Others(layout, speaks=self.speaks)
        self.updates = SharedUpdates(self, self.others, self.links.everyone, layout)
        self._progress = Progress(
            self._fragments,
            self._cycle,
            self._meter,
            self._call,
            self._advice,
            shared=self.links.island is not None,
        )
        self.saving = Saving(
            standing, self._fragments, self._cycle, self._progress, self._meter, self.links
        )
        self._sharing: Sharing | None = None
        if self.links.island is not None and not self._sharded:
            self._sharing = Sharing(self.links, self._call, self._fragments)
        self._read_rates: weakref.WeakMethod[Callable[[], Mapping[int, float]]] | None = None
        self.device = self._call.device = self._fragments[0].device
        self._cycle.restart(warmup_steps)
        self._gradients = StepAverager(
            self.links, self._call, self._meter, sharded=self._sharded, inside=not rules.synchronous
        )
        if rules.synchronous or warmup_steps:
            self._gradients.open()
        self._consensus: Consensus | None = None
        self._block: object = None
        self._shadows = False
        self._finished_at = self._finish_cut_short_at = -1
        self._overwritten = False
        self._written_at = self._touched_at = -2
        # Whether the next local step is the first after finish() or a checkpoint, at which a rank
        # may have other parameters than its vectors; and whether this one has.
        self._resumes = self._rewritten = False
        self._gradients_averaged_for = -1

    @property
    def speaks(self) -> bool:
        """Whether this rank says what holds for all of them."""
        return self.links.everyone.rank == 0

    # Steps.

    @property
    def step(self) -> int:
        """Steps so far."""
        return self._standing.step

    @property
    def averages_gradients(self) -> bool:
        """Whether the step under way averages gradients, as plain DDP does."""
        return self.averages_gradients_for_good or self._standing.step < self._standing.origin

    @property
    def updated_locally(self) -> bool:
        """Whether an update that was made now was one on local gradients."""
        # Of a sharded model a step is counted once its optimizers have made it.
        return self._standing.drifted or (self._sharded and not self.averages_gradients)

    @property
    def averages_gradients_for_good(self) -> bool:
        """Whether parameters are never averaged any more."""
        return self._standing.disabled or self._rules.synchronous

    @property
    def boundary_due(self) -> bool:
        """Whether a boundary waits for the optimizers, was cut short, or has failed for good."""
        return self._call.failed or self._due(self._standing.step) is not None

    def _due(self, step: int) -> Fragment | None:
        """The fragment with the most overdue launch or landing after ``step``."""
        if self.averages_gradients_for_good:
            return None
        first = min(self._fragments, key=lambda fragment: fragment.schedule.next)
        return first if first.schedule.next <= step else None

    @property
    def names(self) -> frozenset[str]:
        """Names of the parameters that are averaged."""
        return frozenset(self._names.values())

    def watch(self, module: nn.Module) -> None:
        """Give advice to who uses this rank's own ``module`` for what it is not."""
        self._advice.watch(module)

    def read_rates_from(self, read: Callable[[], Mapping[int, float]]) -> None:
        """Ask this method for learning rates; whoever has it holds this engine."""
        self._read_rates = weakref.WeakMethod(read)

    def _rates(self) -> Mapping[int, float]:
        read = self._read_rates() if self._read_rates is not None else None
        return read() if read is not None else {}

    def reduce_gradients(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Average a gradient bucket or leave it as it is; the last one of a backward ends a step.

        Inside ``averaged()`` the backward ends in a RegistrationError and is no step; where the
        ranks are not at the same point, in a RoundError.
        """
        self._proceed()
        first, last = self._backwards.place(bucket)
        gradient = done(bucket.buffer())
        if self._consensus is not None:
            if last:
                raise_after_backward(
                    RegistrationError(
                        "A backward ran inside averaged(), whose parameters are put back at its "
                        "end; train outside the block. The step is not counted; clear its "
                        "gradients before going on."
                    )
                )
            return gradient
        averaging = self.averages_gradients
        sharing = self._sharing
        word = 0
        if first and sharing is not None:
            started = self._standing.started and not averaging
            word = sharing.word(started=started, trains=not self._shadows)
        gradient = self._gradients.average(
            bucket, gradient, first=first, last=last, everywhere=averaging, word=word
        )
        if self._call.failed and (averaging or self.links.island is not None):
            return gradient
        if last:
            if self.writes.found:
                self.writes.belong_to_steps()
            try:
                if sharing is not None:
                    agreed = sharing.heed(self._gradients.told)
                    if self._standing.started and not averaging:
                        sharing.gather(self._rules, agreed)
                if not averaging and (self._resumes or not self._standing.started):
                    # Now, since what comes next may be an optimizer already in its step, whose
                    # closure this backward is part of.
                    self._start_together()
                self._count_step(local=not averaging)
                if self._shadows:
                    self._shadows = False
                    # The others come to theirs when their optimizers have stepped. With unused
                    # parameters they wait for a bitmap of DDP's before, which this rank sends next.
                    self.at_boundary(wait=not self._finds_unused)
            except (RoundError, KeyboardInterrupt) as error:
                raise_after_backward(error)
        return gradient

    def before_forward(self, model: nn.Module) -> None:
        """The model is about to run, on the thread that trains."""
        self._proceed()
        if torch.is_grad_enabled():
            self.look_for_writes()
        self._advice.forward()
        if not (model.training or torch.is_grad_enabled() or self._consensus is not None):
            self._advice.evaluated()

    def pass_by(self) -> None:
        """An optimizer has stepped, so that this is the thread that trains."""
        self.thread.move_here()
        self._proceed()

    def _proceed(self) -> None:
        """Start what waits for the training thread to pass, in the same order on every rank."""
        while self._sending and self._sending[0].proceed():
            self._sending.popleft()

    def before_update(
        self, gradients: Sequence[tuple[Tensor, Tensor | None]], *, closure: bool
    ) -> None:
        """An optimizer is about to update a sharded model.

        While gradients are averaged between the islands, they are now, once a step. (Inside an
        island the model does so itself.)

        Args:
            gradients: every parameter's shard, and that of its gradient if it has one.
            closure: whether the step computes the gradients itself.

        Raises:
            RegistrationError: inside ``averaged()``; or the gradients to average come too late.
            RoundError: the ranks are not at the same point, or the communication failed.
        """
        self.refuse_inside_averaged("optimizer.step()")
        self._call.raise_if_failed()
        if not self.averages_gradients:
            if self._resumes or not self._standing.started:
                self._start_together()
            return
        if self._gradients_averaged_for == self._standing.step:
            return
        if closure:
            raise RegistrationError(
                "optimizer.step(closure) computes the gradients of a sharded model after they "
                "should have been averaged; compute them before it, or use warmup_steps=0."
            )
        self._gradients.average_now(gradients)
        self._gradients_averaged_for = self._standing.step

    def after_update(self) -> None:
        """All optimizers have updated a sharded model, or were skipped: a step ends."""
        if not self.averages_gradients and (self._resumes or not self._standing.started):
            # A scaler has skipped the step here, and not in every island.
            self._start_together()
        self._count_step(local=not self.averages_gradients)

    def shadow_step(self) -> None:
        """Ranks with more batches (torch's Join) make a step, or a part of one.

        If it is one that counts, DDP's own shadowing calls the hook next, with gradients of zero.
        """
        self._shadows = True

    def end_shadowing(self, optimizers: OptimizerWatch) -> None:
        """Every rank is out of batches.

        Raises:
            RoundError: a round failed, or a rank of the island is gone.
        """
        self._call.raise_if_failed()
        self._shadows = False
        if self._sharing is not None:
            self._sharing.end_together(optimizers)

    def at_boundary(self, *, wait: bool = True) -> None:
        """Do what is due: use the rounds that land, and launch the next ones.

        Args:
            wait: whether to wait for a round that is launched here and lands at once, too.

        Raises:
            RoundError: a round failed, now or before.
        """
        self.thread.move_here()
        self._call.raise_if_failed()
        self._run_until(self._standing.step, wait=wait)

    def _run_until(self, step: int, *, wait: bool = True, joined: Ticket | None = None) -> None:
        """Do what is due after ``step``; see :meth:`at_boundary`.

        Args:
            step: a step.
            wait: as there.
            joined: the ticket of the first round that is launched, if it has been sent.
        """
        launched: list[Fragment] = []
        while (fragment := self._due(step)) is not None:
            if not wait and fragment in launched and fragment.schedule.landing is not None:
                return
            if not self._standing.started:
                self._start_together()
            if self._sharing is not None:
                self._sharing.follow([fragment])
            schedule, now = fragment.schedule, fragment.schedule.next
            # The earlier of the two, where a loop has missed several.
            landing, launching = (at == now for at in (schedule.landing, schedule.launch))
            # Ctrl-C may end the wait, and the round is waited for again by whatever comes next.
            self._wait_for(fragment)
            with uninterrupted():
                if launching:
                    if landing:
                        self._progress.landed(fragment, self._rules, now)
                    self._launch(fragment, now, mix_first=landing, joined=joined)
                    launched.append(fragment)
                    joined = None
                else:
                    self._mix(fragment)
                    schedule.landed()
                    self._progress.landed(fragment, self._rules, now)
                self.writes.settle()

    def drain(self) -> None:
        """Wait for what is in flight, and its chained updates. It is mixed in when it lands.

        Raises:
            RoundError: a round failed.
        """
        self._call.raise_if_failed()
        for fragment in self._fragments:
            self._wait_for(fragment)
        if self._sharing is not None:
            self._sharing.settle()
            self._idle()

    def _wait_for(self, fragment: Fragment) -> None:
        finished = fragment.round
        if finished is None:
            return
        began = Moment(self.device)
        while finished in self._sending:
            self._sending[0].proceed(wait=True)
            self._sending.popleft()
        cause = finished.wait()
        with uninterrupted():
            fragment.round = None
            if cause is not None:
                fail = self._call.fail_alone if finished.failed_alone else self._call.fail
                fail(cause, finished.number)
            fragment.found(finished, self.layout.islands)
            self._idle()
            self._meter.rounds_used += 1
            self._meter.communication(
                finished.launched, finished.arrived, began, Moment(self.device)
            )

    def _idle(self) -> None:
        """Let the groups go to another state, if nothing is in flight."""
        if all(each.round is None and not each.gathers for each in self._fragments):
            self.links.idle()

    # The consensus model.

    @_outside_inference_mode
    def enter_consensus(self, what: str, hold: Callable[[], Held], block: object = None) -> None:
        """Put the consensus model in place, unless this is inside another ``averaged()``.

        Ctrl-C is held back until the ranks are through with one another: were it to end the call on
        one rank, the others would meet the collectives of its next step.

        Args:
            what: the call that asks for it, which all ranks must have made.
            hold: finds what the model holds besides the parameters that are averaged.
            block: stands for the block that it is put in place for.

        Raises:
            RoundError: a round failed, the ranks are not at the same point, one of them cannot take
                part, or the averaging failed; the models are as they were.
        """
        if self._consensus is not None:
            return
        with uninterrupted():
            self.look_for_writes()
            self.at_boundary()
            self.drain()
            met = self._meet(what, hold)
            while isinstance(met, Ticket):
                self._join(met)
                met = self._meet(what, hold)
            self._block, self._consensus = block, met
            self._advice.averaged(inside=True)
            self._advice.unlike(met.unlike)

    def _join(self, ticket: Ticket) -> None:
        """Take part in a round that others have launched, or in a start that they have come to."""
        joined = ticket.wait().joined
        if joined is not None and joined.what == FIRST_STEP:
            self._start_together(called=True)
            return
        # Past a boundary that is not due here.
        step = min(fragment.schedule.launch for fragment in self._fragments)
        self._run_until(step, joined=ticket)
        self.drain()

    def _meet(self, what: str, hold: Callable[[], Held]) -> Consensus | Ticket:
        self._reshard()
        met = enter(
            what,
            [bucket for fragment in self._fragments for bucket in fragment.buckets],
            hold,
            self._check(),
            self.links,
            self._call,
            self._meter,
            drifted=self._standing.drifted,
        )
        if isinstance(met, Consensus) and met.averages_parameters:
            if not self._standing.drifted:
                self._advice.apart()
            self._standing.drifted = True
        return met

    def leave_consensus(self, block: object) -> None:
        """Put this rank's own model back, if the consensus is there for this very block."""
        if self._consensus is not None and self._block is block:
            self._reshard()
            self._consensus.leave()
            self._consensus = None
            # The block's own writes, and what an evaluation in it has written, say nothing.
            self.writes.settle()
            self._advice.averaged(inside=False)
            self.others.pass_over()

    def finish(self, what: str, hold: Callable[[], Held]) -> None:
        """Drain, end on the consensus model, and begin anew from it if training goes on.

        Raises:
            RegistrationError: inside ``averaged()``.
            RoundError: a round failed, or the averaging did; the models are as they were.
        """
        self.refuse_inside_averaged(what)
        if what == "finish()" and self._finish_cut_short_at == self._standing.step:
            # The other ranks are through with it, and so is this one, but for having said so.
            self._finish_cut_short_at = -1
            return
        finished = False
        try:
            with uninterrupted():
                self.enter_consensus(what, hold)
                assert self._consensus is not None
                step, self._consensus = self._consensus.step, None
                self._begin_anew(step)
                finished = True
        except KeyboardInterrupt:
            self._finish_cut_short_at = self._standing.step if finished else -1
            raise

    def _begin_anew(self, step: int) -> None:
        """Begin anew after ``step``, the last that any rank has made."""
        self._advice.together()
        self.others.pass_over()
        self._overwritten = False
        self.writes.settle()
        self._finished_at = self._standing.step = step
        self._standing.origin = max(self._standing.origin, self._standing.step)
        self._cycle.restart(self._standing.origin)
        for fragment in self._fragments:
            fragment.drop_gathering()
        if self._standing.started:
            # Here, where all ranks have the same parameters: an optimizer may still have to step.
            self._start()
            self._resumes = True

    def disable(self) -> None:
        """Average gradients from the next step on, after :meth:`finish`, and keep no vectors."""
        self._standing.disabled = True
        self._standing.started = False
        try:
            self._gradients.open()
        except RuntimeError as error:
            self._call.fail(f"disable(): {error}")
        for fragment in self._fragments:
            fragment.release()

    def close(self) -> None:
        """Give back the vectors and the groups. Collective, unless a round has failed."""
        self.refuse_inside_averaged("close()")
        if not self._call.failed:
            self.drain()
            self._call("close()")
            # No rank may take down what another still reads from.
            self._call.tell("close()", None)
            self.links.close()
            self._gradients.close()
        self._advice.close()
        for fragment in self._fragments:
            fragment.release()

    def refuse_inside_averaged(self, call: str) -> None:
        """Refuse what would have to do with the parameters of the consensus.

        Raises:
            RegistrationError: this is inside ``averaged()``.
        """
        if self._consensus is not None:
            raise RegistrationError(
                f"{call} was called inside averaged(), where the parameters are not this rank's "
                "own; leave the block first."
            )

    def refuse_unfinished(self) -> None:
        """Refuse to end while the ranks' models differ.

        Raises:
            RegistrationError: local steps were made since :meth:`finish`.
        """
        averaged = not self._standing.drifted or self.averages_gradients_for_good
        if not self._call.failed and not averaged and self._finished_at != self._standing.step:
            raise RegistrationError(
                "close() was called while every rank has a model of its own; call finish() first."
            )

    def look_for_writes(self) -> None:
        """Take note of what somebody else than an optimizer has written to the parameters."""
        step = self._standing.step
        if self._consensus is not None:
            return
        if self._finished_at == step:
            # No step has been made since, which it could be a part of.
            if self.writes.changed:
                self.parameters_overwritten()
            return
        if not self.writes.touched:
            return
        again, self._touched_at = self._touched_at == step - 1, step
        if again:
            # A part of the loop, such as clipping, that goes on at every step.
            self.writes.belong_to_steps()
            self._overwritten &= self._written_at != step - 1
        elif self._overwritten or not self.writes.found:
            # What `load_state_dict` has announced, or what was put back again.
            self.writes.settle()
        else:
            self.parameters_overwritten()
            self._written_at = step

    def parameters_overwritten(self) -> None:
        """Somebody else than an optimizer writes to the parameters."""
        self.writes.settle()
        self._advice.checkpointed()
        self._rewritten = self._finished_at == self._standing.step
        drawn_back = self._rules.overlapped or bool(self._rules.vectors)
        self._overwritten = self._standing.started and drawn_back and not self._rewritten

    def updated_unseen(self) -> None:
        """An optimizer has made a step that this engine knows nothing of."""
        self._standing.drifted = True
        self._advice.stepped(local=True)

    # Reports and checkpoints.

    def stats(self) -> Stats:
        """The counters now; on another thread than the one that trains, those of a moment ago."""
        if self.thread.is_this:
            self._proceed()
            self._gradients.settle()
            self._meter.settle(wait=True)
        stats = self._progress.stats(self._standing.step)
        return replace(stats, foreign_collectives=self.others.counted)

    @_outside_inference_mode
    def state_dict(self) -> dict[str, Any]:
        """Counters and vectors; waits for what is in flight.

        Raises:
            RegistrationError: inside ``averaged()``.
            RoundError: a round failed.
        """
        self.refuse_inside_averaged("state_dict()")
        self.look_for_writes()
        self.at_boundary()
        self.drain()
        self._meter.settle(wait=True)
        self._advice.checkpointed()
        return self.saving.state_dict(self._rules, begins_anew=self._rewritten)

    def check_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Refuse what :meth:`load_state_dict` could not go on from.

        Raises:
            CheckpointError: it is damaged, of another model, or of another share of this one.
        """
        self.saving.check(saved, self._rules)

    @_outside_inference_mode
    def load_state_dict(self, saved: Mapping[str, Any]) -> bool:
        """Go on from what :meth:`state_dict` gave and :meth:`check_state_dict` found good.

        Returns:
            Whether the vectors go on too, see :meth:`Saving.load`.

        Raises:
            RegistrationError: inside ``averaged()``.
        """
        self.refuse_inside_averaged("load_state_dict()")
        self.drain()
        self._advice.checkpointed()
        self._overwritten = self._rewritten = False
        self._finished_at = self._finish_cut_short_at = -1
        self._resumes = True
        self.writes.settle()
        return self.saving.load(saved, self._rules)

    # Inside a boundary.

    @property
    def _rules(self) -> Rules:
        rules = self._rules_alive()
        assert rules is not None
        return rules

    @uninterrupted()
    def _start_together(self, *, called: bool = False) -> None:
        """Start with the same parameters on all workers, unless all have started. Collective.

        DDP has seen to that at its construction, but they may have been written to since, or
        updated from gradients that were not averaged; nobody has for sharded models. An anchor that
        is not the same everywhere would never become so.

        Args:
            called: whether this rank is in a call, and the ranks have met.

        Raises:
            RoundError: the ranks are not at the same point, the communication failed, or sharded
                models differ between islands.
        """
        if self._sharing is not None:
            self._sharing.follow(self._fragments)
        anew, apart = self._rewritten or not self._standing.started, False
        firsts: list[tuple[Bucket, Tensor]] = []
        everyone = self.links.everyone
        if everyone.size > 1:
            if not called:
                self._call(FIRST_STEP)
            bits = combined(
                bucket.ordered_fingerprint() for each in self._fragments for bucket in each.buckets
            )
            try:
                starts, bits_of = zip(*everyone.tell((anew, bits)), strict=True)
                anew = any(starts)
                apart = anew and self.links.peers_differ(bits_of)
                if apart and not self._sharded:
                    self._advice.no_common_start()
                    buckets = [bucket for each in self._fragments for bucket in each.buckets]
                    firsts = [(bucket, bucket.sent_by(everyone.broadcast)) for bucket in buckets]
            except RuntimeError as error:
                self._call.fail(str(error))
            if apart and self._sharded:
                self._call.fail(
                    "the islands begin the local steps with different parameters. Give every "
                    "island the same ones before: the same seed, or the same checkpoint."
                )
        self._resumes = self._rewritten = False
        if firsts and called:
            self._start_from(firsts)
        elif firsts:
            # The backward under way may still need the parameters as they are.
            after_backward(partial(self._start_from, firsts))
        elif anew:
            self._start()

    def _start_from(self, firsts: Sequence[tuple[Bucket, Tensor]]) -> None:
        """Start from other parameters than this rank's own."""
        with torch.no_grad():
            for bucket, flat in firsts:
                bucket.scatter(flat)
        self.writes.settle()
        self._start()

    def _start(self) -> None:
        for fragment in self._fragments:
            fragment.start(self._rules)
            if self._rules.overlapped:
                # What `start` has left in the vectors is the first result to land.
                fragment.schedule.landing = fragment.schedule.launch
        self._standing.started = True
        self._resumes = self._rewritten = False

    def _count_step(self, *, local: bool) -> None:
        self._standing.step += 1
        self.counted += 1
        self._progress.stepped(local=local)
        self.others.stepped(local=local)
        # On every rank at once, whose optimizer may skip the step, since it decides what
        # averaged() sends; and for good, since optimizers keep what they saw of local gradients.
        self._standing.drifted |= local

    def _launch(
        self, fragment: Fragment, step: int, *, mix_first: bool, joined: Ticket | None = None
    ) -> None:
        if self._overwritten and self._written_at < self._standing.step - 1:
            self._overwritten = False
            self._advice.overwritten()
        number = self._meter.rounds_launched + 1
        self._reshard()
        refusal = self._check() or fragment.refusal()
        if mix_first and self._sharing is not None:
            # If not, nobody in the island mixes, and the round ends in an error on every rank.
            mix_first = self._sharing.prepare(fragment, self._rules, refusal)
        probes: list[Tensor] = []
        fingerprint: int | Tensor = 0
        report = Report()
        if refusal is None:
            fingerprint = fragment.fingerprint if self._sharing is not None else 0
            names = ("mix", "contribute") if mix_first else ("contribute",)
            probes = fragment.sweep(self._rules, *names)
            report = self._progress.report(fragment, self._rates().values())
        self.links.busy()
        fragment.round = Round(
            Point("a round", step, number),
            self.device,
            fragment.buckets,
            fragment.wires,
            self.links,
            self._rules,
            fragment.kept,
            probes,
            refusal=refusal,
            fingerprint=fingerprint,
            report=report,
            drifts=fragment.drifts,
            prepare=partial(fragment.prepare, self._rules, self._rates, self.links.peers),
            joined=joined,
        )
        self._sending.append(fragment.round)
        self._cycle.launched(fragment.schedule)
        self._meter.rounds_launched = number
        self._meter.bytes_reduced += fragment.nbytes
        if mix_first and self._sharing is not None:
            self._sharing.complete(fragment)

    @_outside_inference_mode
    def drift(self) -> DriftTable:
        """How far every parameter is from what the workers have in common. Collective.

        Raises:
            RegistrationError: inside ``averaged()``, or there are no local steps yet or any more.
            RoundError: a round failed, the ranks are not at the same point, or one of them cannot
                take part.
        """
        self.refuse_inside_averaged("drift()")
        if not self._standing.started:
            raise RegistrationError(
                "drift() compares the workers' models, which are the same before the first local "
                "step and under averaged gradients."
            )
        with uninterrupted():
            self.at_boundary()
            self.drain()
            self._reshard()
            refusals = (self._check(), *(fragment.refusal() for fragment in self._fragments))
            refusal = next(filter(None, refusals), None)
            while (ticket := self._call("drift()", refusal)).wait().joined is not None:
                self._join(ticket)
            buckets = [bucket for fragment in self._fragments for bucket in fragment.buckets]
            self.links.busy()
            try:
                table = drift_table(buckets, self._rules.reference, self._names, self.links)
            except RuntimeError as error:
                self._call.fail(f"drift(): {error}")
            self._idle()
        return table

    def observe(self, loss: float | Tensor) -> None:
        """The user tells the loss of a step."""
        self._progress.observe(loss)

    def _mix(self, fragment: Fragment) -> None:
        self._reshard()
        if self._sharing is None:
            fragment.sweep(self._rules, "mix")
        else:
            self._sharing.land(fragment, self._rules)
            self._idle()
