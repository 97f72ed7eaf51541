"""How many steps lie between two rounds, where that is not one number for the whole run.

A *period* is any function ``period(step, rates, stats)`` that gives a number of steps, at least 1.
It is called where a round lands, on every rank, with values that all ranks know alike:

- ``step``: steps so far;
- ``rates``: the largest learning rates in force at that round's launch, the largest first, at most
  four of them, and none where the optimizers are not known yet;
- ``stats``: a :class:`commhooks.Stats`, with the figures of the slowest rank where they differ
  (``bytes_reduced`` and ``consensus_distance`` are 0).

So it must depend on nothing else. What it gives is the distance from the next launch to the one
after it; with blocking rounds, which land where they are launched, from this launch to the next.
Before the first round it is called with ``Stats()``, on registration, and all ranks must then get
the same number. That one counts up to 128, and each later one up to twice the number before
(:class:`Hidden` has a limit of its own). It can be pickled if it is a function of a module, or one
of the classes here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from commhooks.errors import HyperParameterError
from commhooks.hyperparameters import Count, Positive, Steps, checked_fields
from commhooks.stats import Stats

__all__ = ["QSR", "AdaComm", "Hidden", "Period", "chosen", "hides"]

Period = Callable[[int, Sequence[float], Stats], int]
"""``period(step, rates, stats)``."""


@dataclass
class Hidden:
    """The smallest tau that hides a round under the steps, with some to spare.

    ``tau="auto"`` is this one. A round of all fragments takes ``stats.round_seconds``, and tau
    steps have to take ``1 + slack`` times as long. The times vary from round to round. So a tau
    stays as it is while it leaves half of the slack, and is not too long by more than the slack.

    Args:
        slack: what is to spare, as a part of a round.
        longest: the largest tau; on a link that would need a larger one, rounds are waited for.
        first: tau until a round has been measured.

    Raises:
        HyperParameterError: an argument has the wrong type or lies outside its range.
    """

    slack: Positive = 0.2
    longest: Steps = 128
    first: Steps = 8

    def __post_init__(self) -> None:
        checked_fields(self)

    def __call__(self, step: int, rates: Sequence[float], stats: Stats) -> int:
        """Steps from one launch to the next."""
        tau = min(stats.tau or self.first, self.longest)
        if not (stats.round_seconds and stats.step_seconds):
            return tau
        steps = stats.round_seconds / stats.step_seconds
        needed = min(max(1, math.ceil((1 + self.slack) * steps)), self.longest)
        enough = tau >= min((1 + self.slack / 2) * steps, self.longest)
        return tau if enough and tau <= (1 + self.slack) * needed else needed


@dataclass
class QSR:
    r"""Quadratic synchronisation rule: longer rounds late (Gu et al., ICLR 2024, arXiv:2310.14423).

    .. math:: \tau = \max(\tau_\text{base}, \lfloor (a / \gamma)^2 \rfloor)

    with the learning rate :math:`\gamma` in force, the largest if there are several. A small rate
    is a reason for longer rounds only where it has come down to it: while the rate rises, or is 0,
    rounds get no longer. So they are of ``tau_base`` steps from the start to the end of a warm-up,
    and at most twice as long as the one before at any time.

    Args:
        tau_base: the smallest tau, and the first one.
        a: about the learning rate at which tau begins to grow, times the root of ``tau_base``.
        warmup_steps: steps during which tau is ``tau_base`` whatever the rate does.
        longest: the largest tau; None for no limit.

    Raises:
        HyperParameterError: an argument has the wrong type or lies outside its range.
    """

    tau_base: Steps
    a: Positive
    warmup_steps: Count = 0
    longest: Steps | None = None

    def __post_init__(self) -> None:
        checked_fields(self)

    def __call__(self, step: int, rates: Sequence[float], stats: Stats) -> int:
        """Steps from one launch to the next."""
        if step < self.warmup_steps:
            return self.tau_base
        rate = max(rates, default=0.0)
        tau = max(self.tau_base, math.floor(min(self.a / rate, _MANY) ** 2)) if rate else _MANY
        if stats.last_rate is None or not 0 < rate <= stats.last_rate:
            tau = min(tau, max(self.tau_base, stats.tau))
        return tau if self.longest is None else min(tau, self.longest)


_MANY = 10**9
"""Steps; the square of a number above it may be no number any more."""


@dataclass
class AdaComm:
    r"""Adaptive communication (Wang & Joshi, MLSys 2019): shorter rounds late.

    .. math:: \tau = \lceil \tau_0 \sqrt{F / F_0} \rceil

    with the training loss :math:`F`, averaged over the workers, and :math:`F_0` at the start. The
    loop tells it: ``state.observe(loss)`` after each backward. F is the mean over the steps between
    two launches, and F_0 the first one that is above 0. Where a mean is inf or NaN, tau stays as it
    is. Only losses that are above 0 have a meaning here, since it is their ratio that counts. tau
    is never above twice ``tau0``, since a first loss near 0 says nothing of the later ones.

    Args:
        tau0: tau at the start.

    Raises:
        HyperParameterError: ``tau0`` is no integer of at least 1.
    """

    tau0: Steps

    def __post_init__(self) -> None:
        checked_fields(self)

    def __call__(self, step: int, rates: Sequence[float], stats: Stats) -> int:
        """Steps from one launch to the next."""
        if stats.loss is None or stats.first_loss is None:
            return stats.tau or self.tau0
        ratio = max(0.0, stats.loss) / stats.first_loss
        return max(1, math.ceil(self.tau0 * min(2.0, math.sqrt(ratio))))


def hides(tau: object) -> bool:
    """Whether a tau is chosen so that rounds are hidden."""
    return isinstance(tau, Hidden) or (isinstance(tau, str) and tau == "auto")


def chosen(
    tau: int | Literal["auto"] | Period,
    step: int,
    rates: Sequence[float],
    stats: Stats,
    *,
    now: int | None = None,
) -> int:
    """How many steps lie between two launches.

    A period is asked when a round lands. Were it to answer a single odd reading with a very large
    number, there would be no round any more at which it could think again.

    Args:
        tau: the number, or the period that chooses it.
        step: what the period is called with first.
        rates: what it is called with next.
        stats: what it is called with last.
        now: tau until now, which is at most doubled; None on registration.

    Raises:
        HyperParameterError: a period has not given a number of steps.
    """
    if isinstance(tau, int):
        return tau
    period = Hidden() if tau == "auto" else tau
    try:
        steps: object = period(step, rates, stats)
    except Exception as error:
        raise HyperParameterError(f"The period {period!r} raised {error!r}.") from error
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise HyperParameterError(
            f"The period {period!r} gave {steps!r}, which is no number of steps from 1."
        )
    if isinstance(period, Hidden):
        return int(steps)  # it has a limit of its own
    if now is not None:
        return min(int(steps), 2 * now)
    # Those that are given here begin at an argument of theirs.
    return int(steps) if isinstance(period, QSR | AdaComm) else min(int(steps), _LONGEST_FIRST)


_LONGEST_FIRST = 128
"""Steps before the first round, where a user's function chooses by what it sees on registration."""
