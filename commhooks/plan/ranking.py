"""Which algorithm, tau, compression and island to take: every sensible combination, ranked."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from commhooks.plan.model import (
    COMPRESSIONS,
    Algorithm,
    Network,
    Prediction,
    Work,
    algorithms,
    exposed_rounds,
    gathering_seconds,
    predict,
)

__all__ = [
    "LONGEST",
    "REASON",
    "SMALL",
    "Choice",
    "choices",
    "constructor",
    "learning_rate",
    "needed_tau",
]

LONGEST = 128
"""The longest tau that is tried."""

SMALL = 8
"""A tau up to this one cost little where docs/choosing.md measured it.

So a smaller one is no reason to round more.
"""

REASON = (
    "Ranked by what is hidden (at most 5% of a step exposed), then by the smaller tau (up to "
    "{small} they count alike),\nless rounding, the smallest tau, fewer workers, the order of "
    "docs/choosing.md, and less memory."
)
"""The order of :func:`choices`, in a sentence."""

# A blocking round, or DDP's gradients, may cost so much of a step and count as hidden.
_LITTLE = 0.05
# An overlapped round must fit under its steps when they are so many times as fast as predicted.
_SLACK = 1.2
# From here on docs/choosing.md recommends DiLoCo, which was made for such a tau.
_LONG = 50
_NO_END = 2**40

# In the order in which docs/choosing.md recommends them where the rest is equal: how to make each,
# and its learning rate, times DDP's.
_STREAMING = "DiLoCo in fragments"
_ADVICE = {
    "AllReduce": ("AllReduce({})", "1"),
    "OverlapLocalSGD, beta > 0": ("OverlapLocalSGD(tau={tau}, beta=0.7{})", "1.5, then try 3"),
    "CoCoDSGD": ("CoCoDSGD(tau={tau}{})", "1"),
    "OverlapLocalSGD": ("OverlapLocalSGD(tau={tau}{})", "2.5"),
    "EASGD": ("EASGD(tau={tau}{})", "1.5 (2 workers)"),
    "DiLoCo, delay=tau, merge=carry": (
        'DiLoCo(tau={tau}, delay={delay}, merge="carry"{})',
        "1, and tune outer",
    ),
    # With alpha=0 a delay of tau learns nothing.
    "DiLoCo, delay=tau": ("DiLoCo(tau={tau}, delay={delay}, alpha=0.5{})", "1, and tune outer"),
    _STREAMING: (
        "DiLoCo(tau={tau}, fragments={fragments}, delay={delay}, alpha=0.5{})",
        "1, and tune outer",
    ),
    "LocalSGD": ("LocalSGD(tau={tau}{})", "1"),
    "SlowMo": ("SlowMo(tau={tau}{})", "0.5 to 1"),
    "DiLoCo": ("DiLoCo(tau={tau}{})", "1, and tune outer"),
    "BMUF": ("BMUF(tau={tau}{})", "1 / workers"),
}
_ORDER = list(_ADVICE)


@dataclass(frozen=True)
class Choice:
    """One algorithm with all that has to be chosen, and what it will do.

    Attributes:
        prediction: with the algorithm and its tau.
        work: with the compression.
        network: with the island.
    """

    prediction: Prediction
    work: Work
    network: Network

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm."""
        return self.prediction.algorithm

    @property
    def compression(self) -> str | None:
        """What its rounds are rounded to; gradients are not."""
        return None if self.algorithm.kind == "step" else self.work.compression

    @property
    def hidden(self) -> bool:
        """Whether communication costs little."""
        return self.prediction.exposed <= _LITTLE * self.work.step


def choices(
    work: Work,
    network: Network,
    *,
    fragments: int = 4,
    longest: int = LONGEST,
    small: int = SMALL,
    compressions: Sequence[str | None] = COMPRESSIONS,
    memory: float = math.inf,
) -> list[Choice]:
    """Every sensible combination, each with the smallest tau that hides its rounds; the best first.

    Args:
        work: what is trained; its compression is not looked at.
        network: what joins the ranks. Where several share a machine (``per_node``), they are taken
            as workers by themselves, and as one worker.
        fragments: of DiLoCo's streaming form.
        longest: the tau of what no smaller one hides.
        small: taus up to this one are equally good.
        compressions: those to try.
        memory: bytes that an algorithm may keep besides the model.
    """
    found = [
        Choice(predict(algorithm, tau, each, joined), each, joined)
        for algorithm, each, joined in _combinations(work, network, fragments, compressions)
        for tau in (_smallest_tau(algorithm, each, joined, longest),)
    ]
    affordable = [choice for choice in found if choice.prediction.memory <= memory]
    return sorted(affordable, key=lambda choice: _rank(choice, small))


def needed_tau(choice: Choice) -> int:
    """The smallest tau that hides the rounds of ``choice``, however long it is."""

    def hides(tau: int) -> bool:
        return _hides(tau, choice.algorithm, choice.work, choice.network)

    return 1 + bisect_left(range(1, _NO_END), True, key=hides)


def constructor(choice: Choice) -> str:
    """The call that makes the state, to be pasted."""
    form, _ = _ADVICE[_known_as(choice.algorithm)]
    more = f', compression="{choice.compression}"' if choice.compression else ""
    if choice.network.island > 1:
        more += ', island="node"'
    found = choice.prediction
    call = form.format(more, tau=found.tau, delay=found.delay, fragments=choice.algorithm.fragments)
    return f"commhooks.{call}"


def learning_rate(algorithm: Algorithm) -> str:
    """By what to multiply DDP's learning rate, as in the first table of docs/choosing.md."""
    return _ADVICE[_known_as(algorithm)][1]


def _combinations(
    work: Work, network: Network, fragments: int, compressions: Sequence[str | None]
) -> Iterator[tuple[Algorithm, Work, Network]]:
    """What could be chosen, tau aside. DDP rounds nothing, and knows no islands."""
    for algorithm in algorithms(fragments):
        if algorithm.kind == "step":
            yield algorithm, replace(work, compression=None), replace(network, island=1)
            continue
        for island in sorted({1, network.per_node}):
            for compression in compressions:
                yield (
                    algorithm,
                    replace(work, compression=compression),
                    replace(network, island=island),
                )


def _smallest_tau(algorithm: Algorithm, work: Work, network: Network, longest: int) -> int:
    """The smallest tau that hides rounds with a fifth to spare, or costs little if they block."""
    if algorithm.kind == "step":
        return 1
    candidates = range(1, longest)
    return next((t for t in candidates if _hides(t, algorithm, work, network)), longest)


def _hides(tau: int, algorithm: Algorithm, work: Work, network: Network) -> bool:
    waited = exposed_rounds(algorithm, tau, work, network) + gathering_seconds(work, network) / tau
    if waited > _LITTLE * work.step:
        return False
    hurried = replace(work, step=work.step / _SLACK)
    return algorithm.kind == "blocking" or exposed_rounds(algorithm, tau, hurried, network) == 0


def _rank(choice: Choice, small: int) -> tuple[float, ...]:
    """What to sort by: less is better, and the first number that differs decides."""
    found = choice.prediction
    return (
        # What is not hidden is waited for at every step, so that this decides first.
        0.0 if choice.hidden else found.exposed,
        max(found.tau, small),
        COMPRESSIONS.index(choice.compression),
        found.tau,
        # Under DDP all ranks hold one model, like one worker.
        1 if found.algorithm.kind == "step" else choice.network.workers,
        _preference(found),
        found.memory,
    )


def _preference(found: Prediction) -> int:
    if found.tau >= _LONG and found.algorithm.name == "DiLoCo, delay=tau, merge=carry":
        return -1
    return _ORDER.index(_known_as(found.algorithm))


def _known_as(algorithm: Algorithm) -> str:
    return algorithm.name if algorithm.name in _ADVICE else _STREAMING
