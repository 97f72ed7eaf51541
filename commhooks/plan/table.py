"""What is printed: predictions in columns, and the sentences below them."""

from __future__ import annotations

from collections.abc import Sequence

from commhooks.plan.model import (
    COMPRESSIONS,
    Algorithm,
    Network,
    Prediction,
    Work,
    algorithms,
    hiding_delay,
    hiding_tau,
    predict,
)
from commhooks.plan.ranking import (
    LONGEST,
    REASON,
    SMALL,
    Choice,
    constructor,
    learning_rate,
    needed_tau,
)

__all__ = ["of_fixed_tau", "of_ranking"]

_FIGURES = ("step", "exposed", "MB/step", "peak MB", "memory MB")
_UNITS = (
    "step and exposed in ms. MB/step: on each link, on average; peak: what the rounds launched "
    "after one step send."
)


def of_fixed_tau(work: Work, network: Network, fragments: int, taus: Sequence[int]) -> str:
    """Every algorithm with every tau, in no order of merit."""
    rows = [
        (found.algorithm.name, str(found.tau), str(found.delay), *_figures(found))
        for algorithm in algorithms(fragments)
        for found in _predictions(algorithm, taus, work, network)
    ]
    part, delay = work.round_seconds(network, fragments), hiding_delay(work, network, fragments)
    return (
        f"{_columns(('algorithm', 'tau', 'delay', *_FIGURES), rows)}\n\n"
        f"{_UNITS}\n"
        f"A round of the whole model takes {work.round_seconds(network) * 1e3:,.1f} ms. The "
        f"smallest tau that hides it under the steps is {hiding_tau(work, network)}.\n"
        f"One of a fragment ({fragments} in all) takes {part * 1e3:,.1f} ms, which a delay of "
        f"{delay} hides.\n"
    )


def of_ranking(
    ranked: Sequence[Choice], *, rows: int = 10, longest: int = LONGEST, small: int = SMALL
) -> str:
    """The best choices, and the first of them as a call.

    Args:
        ranked: the best first.
        rows: how many to show; DDP is shown in any case, for comparison.
        longest: the longest tau that was tried.
        small: taus up to this one counted alike.
    """
    heading = ("algorithm", "rounds", "island", "tau", *_FIGURES)
    table = _columns(heading, [_row(choice) for choice in _shown(ranked, rows)], words=2)
    return f"{table}\n\n{_UNITS}\n{REASON.format(small=small)}\n\n{_advice(ranked, longest)}"


def _predictions(
    algorithm: Algorithm, taus: Sequence[int], work: Work, network: Network
) -> list[Prediction]:
    of = (1,) if algorithm.kind == "step" else taus
    return [predict(algorithm, tau, work, network) for tau in of]


def _shown(ranked: Sequence[Choice], rows: int) -> list[Choice]:
    """Every algorithm in its best form, and the first choice with other compressions as well.

    The rest would be the same algorithms with larger taus, once for every compression and island.
    """
    first, shown, seen = ranked[0], list[Choice](), set[str]()
    for choice in ranked:
        name = choice.algorithm.name
        variant = name == first.algorithm.name and choice.network.island == first.network.island
        ddp = choice.algorithm.kind == "step"
        if (variant or name not in seen) and (len(shown) < rows or ddp):
            shown.append(choice)
        seen.add(name)
    return shown


def _row(choice: Choice) -> tuple[str, ...]:
    ddp = choice.algorithm.kind == "step"
    return (
        "plain DDP" if ddp else choice.algorithm.name,
        "" if ddp else choice.compression or "exact",
        str(choice.network.island),
        str(choice.prediction.tau),
        *_figures(choice.prediction),
    )


def _cut(ranked: Sequence[Choice], longest: int) -> str:
    """Which longer taus the first choice's algorithm would need with which rounding."""
    first = ranked[0]
    needed = {
        choice.compression or "exact": needed_tau(choice)
        for choice in sorted(ranked, key=lambda choice: COMPRESSIONS.index(choice.compression))
        if choice.algorithm == first.algorithm and choice.network == first.network
    }
    taus = [f"{tau:,} ({rounds})" for rounds, tau in needed.items() if tau > longest]
    if not taus or first.algorithm.kind == "step":
        return ""
    return (
        f"No tau above {longest} was tried (--longest-tau). To hide its rounds, "
        f"{first.algorithm.name} would need {', '.join(taus)}.\n"
    )


def _advice(ranked: Sequence[Choice], longest: int) -> str:
    first = ranked[0]
    if first.algorithm.kind == "step" and first.hidden:
        return "First choice: plain DDP; there is nothing to gain.\n"
    late = (
        ""
        if first.hidden
        else f"Nothing is hidden with a tau up to {longest}; the first waits the least.\n"
    )
    return (
        f"{late}{_cut(ranked, longest)}First choice: {constructor(first)}\n"
        f"Learning rate: DDP's times state.lr_factor: {learning_rate(first.algorithm)}.\n"
    )


def _figures(found: Prediction) -> tuple[str, ...]:
    return (
        f"{found.step * 1e3:,.1f}",
        f"{found.exposed * 1e3:,.1f}",
        f"{found.sent / 1e6:,.1f}",
        f"{found.peak / 1e6:,.1f}",
        f"{found.memory / 1e6:,.0f}",
    )


def _columns(heading: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table whose first ``words`` columns are words, and the others figures."""
    lines = [heading, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
