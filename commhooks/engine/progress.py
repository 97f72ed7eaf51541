"""How a run goes: what its ranks tell one another, what follows for tau, and what users see."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from commhooks.engine.advice import Advice
from commhooks.engine.meter import Meter
from commhooks.engine.network.report import Report
from commhooks.engine.network.roll_call import RollCall
from commhooks.engine.pace import Pace
from commhooks.engine.rounds.findings import seen_together
from commhooks.engine.rounds.fragment import Fragment
from commhooks.engine.rounds.schedule import Cycle
from commhooks.engine.rules import Rules
from commhooks.errors import HyperParameterError
from commhooks.periods import AdaComm, chosen
from commhooks.stats import Stats

__all__ = ["Progress"]


class Progress:
    """Keeps count of a run, and lets the period choose tau.

    Args:
        fragments: the model.
        cycle: when they launch.
        meter: what has been sent, and how long it took.
        call: where a failure is noted.
        advice: what the log says.
        shared: whether the ranks of an island share the model out.
    """

    def __init__(
        self,
        fragments: Sequence[Fragment],
        cycle: Cycle,
        meter: Meter,
        call: RollCall,
        advice: Advice,
        *,
        shared: bool,
    ) -> None:
        self._fragments = fragments
        self._cycle = cycle
        self._meter = meter
        self._call = call
        self._advice = advice
        self._shared = shared
        self._pace = Pace()
        self._first_loss: float | None = None

    def stepped(self, *, local: bool) -> None:
        """A step was made."""
        self._pace.step(self._meter.seconds_exposed)
        self._advice.stepped(local=local)

    def observe(self, loss: float | Tensor) -> None:
        """The user tells the loss of a step."""
        self._pace.observe(loss)

    def report(self, fragment: Fragment, rates: Iterable[float]) -> Report:
        """What this rank tells the others with a round of ``fragment``.

        Args:
            fragment: what is launched.
            rates: the learning rates in force.
        """
        report = fragment.report(shared=self._shared)
        report.step_seconds = self._pace.step_seconds
        report.seconds_exposed = self._meter.seconds_exposed
        report.seconds_hidden = self._meter.seconds_hidden
        report.loss, report.losses = self._pace.loss, float(self._pace.losses)
        self._pace.forget_losses()
        report.rates = tuple(rates)
        return report

    def landed(self, fragment: Fragment, rules: Rules, step: int) -> None:
        """A round lands: let the period choose how long the next cycle is.

        It is shown what all ranks know alike, at the same step.

        Raises:
            RoundError: it chose something that is no number of steps.
        """
        before = fragment.findings
        fragment.landed()
        found = fragment.findings
        if found is None:
            return
        if self._first_loss is None and found.loss is not None and found.loss > 0:
            self._first_loss = found.loss
        stats = Stats(
            step=step,
            rounds_launched=self._meter.rounds_launched,
            rounds_completed=self._meter.rounds_launched,
            seconds_exposed=found.seconds_exposed,
            seconds_hidden=found.seconds_hidden,
            tau=self._cycle.next_tau,
            first_loss=self._first_loss,
            last_rate=max(before.rates, default=0.0) if before is not None else None,
            **seen_together(each.findings for each in self._fragments),
        )
        self._advice.landed(stats)
        if isinstance(rules.tau, int):
            return
        if isinstance(rules.tau, AdaComm):
            self._advice.compared(found.loss)
        try:
            tau = chosen(rules.tau, step, tuple(found.rates), stats, now=self._cycle.tau)
        except HyperParameterError as error:
            self._call.fail(str(error))
        self._cycle.adopt(tau)

    def stats(self, step: int) -> Stats:
        """The counters now."""
        meter = self._meter
        hidden, arrived = meter.seconds_hidden, 0
        square = 0.0
        for fragment in self._fragments:
            # Once: the training thread may take it away, if this is another one.
            flying = fragment.round
            if flying is not None and flying.done:
                # Whenever it is waited for, it was hidden until now.
                arrived += 1
                hidden += max(0.0, flying.arrived.seconds_since(flying.launched))
            if fragment.squared_distance is not None:
                square += fragment.squared_distance.read().item()
        return Stats(
            step=step,
            rounds_launched=meter.rounds_launched,
            rounds_completed=meter.rounds_used + arrived,
            bytes_reduced=meter.bytes_reduced,
            seconds_exposed=meter.seconds_exposed,
            seconds_hidden=hidden,
            consensus_distance=math.sqrt(square),
            tau=self._cycle.tau,
            first_loss=self._first_loss,
            **seen_together(fragment.seen for fragment in self._fragments),
        )

    def state_dict(self) -> dict[str, Any]:
        """The losses as plain values."""
        return {**self._pace.state_dict(), "first": self._first_loss}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._pace.load_state_dict(saved)
        self._first_loss = saved["first"]
