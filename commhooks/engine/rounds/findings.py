"""What the reports of all ranks say together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from commhooks.engine.network.report import NAMES, RATES

__all__ = ["Findings", "findings_of", "seen_together"]


@dataclass(frozen=True)
class Findings:
    """What all ranks' reports of one fragment's round say together, the same on every rank.

    Attributes:
        apart: sum over workers of ||x_i - z||^2.
        length: m ||z||^2, for m workers.
        moved: ||c_i - z||^2 of every worker.
        together: ||mean c - z||^2.
        step_seconds: of the slowest rank.
        round_seconds: of the rank that launched it last, which is the quickest.
        seconds_exposed, seconds_hidden: the most of any rank.
        loss: mean of the losses that ranks were told; None if none was.
        rates: the largest learning rates of any rank, the largest first.
    """

    apart: float
    length: float
    moved: Sequence[float]
    together: float
    step_seconds: float
    round_seconds: float
    seconds_exposed: float
    seconds_hidden: float
    loss: float | None
    rates: Sequence[float]

    def state_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "moved": list(self.moved), "rates": list(self.rates)}

    @classmethod
    def refusal(cls, saved: object, m: int) -> str | None:
        """What is wrong with what :meth:`state_dict` gave for m workers, if anything is."""
        if not isinstance(saved, Mapping) or set(saved) != {field.name for field in fields(cls)}:
            return "the findings of a round"
        lists = [saved["moved"], saved["rates"]]
        if not all(isinstance(each, list) for each in lists):
            return "lists of numbers for moved and rates"
        loss = saved["loss"]
        rest = [v for name, v in saved.items() if name not in ("moved", "rates", "loss")]
        numbers = [*rest, *saved["moved"], *saved["rates"]]
        good = all(isinstance(n, float) and math.isfinite(n) and n >= 0 for n in numbers)
        if not good or len(saved["moved"]) != m or len(saved["rates"]) > RATES:
            return f"numbers from 0, {m} of them for moved and up to {RATES} for rates"
        if loss is not None and not isinstance(loss, float):
            return "a loss that is a number or None"
        return None


def findings_of(
    rows: Mapping[int, Sequence[float]], islands: Sequence[Sequence[int]], together: float
) -> Findings:
    """What the ranks' reports say.

    Args:
        rows: every rank's, by its number.
        islands: which ranks make one worker.
        together: ||mean c - z||^2, where every rank is a worker and so knows it.
    """
    reports = [dict(zip(NAMES, row, strict=False)) for row in rows.values()]
    of = dict(zip(rows, reports, strict=True))

    def over(name: str, ranks: Iterable[int]) -> float:
        return math.fsum(of[rank][name] for rank in ranks)

    flat = all(len(island) == 1 for island in islands)
    losses = over("losses", rows)
    # A plain sum, since inf and -inf have none that is exact.
    loss = sum(report["loss"] for report in reports) / losses if losses else math.nan
    known = [report["round_seconds"] for report in reports if report["round_seconds"]]
    largest = [max(column) for column in zip(*rows.values(), strict=True)][len(NAMES) :]
    return Findings(
        apart=over("apart", rows),
        length=over("length", rows),
        moved=[over("moved", island) for island in islands],
        together=together if flat else over("together", rows) / len(islands),
        step_seconds=max(report["step_seconds"] for report in reports),
        round_seconds=min(known, default=0.0),
        seconds_exposed=max(report["seconds_exposed"] for report in reports),
        seconds_hidden=max(report["seconds_hidden"] for report in reports),
        loss=loss if math.isfinite(loss) else None,
        rates=[rate for rate in largest if rate],
    )


def seen_together(findings: Iterable[Findings | None]) -> dict[str, Any]:
    """Figures of :class:`commhooks.Stats` over all fragments, from the last round of each."""
    each = [found for found in findings if found is not None]
    if not each:
        return {}
    length = math.fsum(found.length for found in each)
    apart = math.fsum(found.apart for found in each)
    workers = zip(*(found.moved for found in each), strict=True)
    alone = [math.sqrt(math.fsum(squares)) for squares in workers]
    together = math.sqrt(math.fsum(found.together for found in each))
    mean = math.fsum(alone) / len(alone)
    return {
        "relative_drift": math.sqrt(apart / length) if length else 0.0,
        # By rounding it may come out a little above 1.
        "agreement": min(1.0, together / mean) if mean else 0.0,
        "step_seconds": max(found.step_seconds for found in each),
        "round_seconds": math.fsum(found.round_seconds for found in each),
        "loss": each[-1].loss,
    }
