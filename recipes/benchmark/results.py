"""Samples of a race, gathered into one line a contender."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmark.contenders import ALONE, BASELINE

__all__ = ["Cell", "Line", "lines", "medians"]


@dataclass(frozen=True)
class Cell:
    """One network and load, on which all contenders are measured.

    Attributes:
        ranks: number of them.
        rate: of each machine's link.
        load: what is trained.
        per_node: ranks of a machine.
        tau: steps between averagings; None for the benchmark's.
    """

    ranks: int
    rate: str
    load: str
    per_node: int = 1
    tau: int | None = None

    @property
    def title(self) -> str:
        """For tables and pictures."""
        ranks = f"{self.ranks} ranks"
        if self.per_node > 1:
            ranks = f"{self.ranks // self.per_node} machines of {self.per_node} ranks"
        tau = f", tau={self.tau}" if self.tau else ""
        return f"{self.load}, {ranks}, {self.rate}{tau}"


@dataclass(frozen=True)
class Line:
    """One contender's results in one cell; seconds are those of one synchronisation.

    Attributes:
        contender: its name.
        kind: when it communicates.
        multiple: step time in units of no communication; median, least and most.
        above: seconds a step took over no communication, median.
        exposed: seconds the training thread waited for a synchronisation; None if nobody counts.
        hidden: seconds a synchronisation went on under the steps, likewise.
        sent: bytes a rank put on the wire for one synchronisation; None if not counted.
        sent_per_step: the same for one step, on average.
        peak_sent: the most bytes a rank put on the wire during one step; None if not counted.
        peak: most memory it took, in units of the parameters.
        samples: how many the multiple is from.
        step_seconds: time of a step, median.
        parameters: of the model, in bytes.
    """

    contender: str
    kind: str
    multiple: tuple[float, float, float]
    above: float
    exposed: float | None
    hidden: float | None
    sent: float | None
    sent_per_step: float | None
    peak_sent: float | None
    peak: float
    samples: int
    step_seconds: float
    parameters: int


def medians(results: Mapping[Cell, Sequence[Line]], tau: int) -> list[dict[str, Any]]:
    """What a model of the cost needs to predict, and what was measured, one record a line."""
    return [
        {
            "rate": cell.rate,
            "ranks": cell.ranks,
            "tau": cell.tau or tau,
            "contender": line.contender,
            "parameter_bytes": line.parameters,
            "compute_ms": round(1e3 * (line.step_seconds - line.above), 3),
            "step_ms": round(1e3 * line.step_seconds, 3),
        }
        for cell, found in results.items()
        if cell.load == "pretend" and cell.rate != "unshaped" and cell.per_node == 1
        for line in found
        if line.contender != ALONE
    ]


def lines(samples: Sequence[dict[str, Any]], tau: int) -> list[Line]:
    """One line a contender, in the order in which they were measured.

    A sample is compared with no communication in the same repeat, so that what the machine does
    besides weighs on both.
    """
    baseline = {
        repeat: statistics.median(
            _per_step(s) for s in samples if s["contender"] == BASELINE and s["repeat"] == repeat
        )
        for repeat in {sample["repeat"] for sample in samples}
    }
    names = dict.fromkeys(sample["contender"] for sample in samples)
    return [_line([s for s in samples if s["contender"] == name], baseline, tau) for name in names]


def _line(own: list[dict[str, Any]], baseline: dict[int, float], tau: int) -> Line:
    multiples = [_per_step(s) / baseline[s["repeat"]] for s in own]
    first = own[0]
    sent = _median([s["sent"] for s in own])
    return Line(
        contender=first["contender"],
        kind=first["kind"],
        multiple=(statistics.median(multiples), min(multiples), max(multiples)),
        above=statistics.median(_per_step(s) - baseline[s["repeat"]] for s in own),
        exposed=_median([s["exposed"] for s in own]),
        hidden=_median([s["hidden"] for s in own]),
        sent=sent,
        sent_per_step=None if sent is None else sent / (1 if first["kind"] == "step" else tau),
        peak_sent=_median([s["peak_sent"] for s in own]),
        peak=max(s["peak"] for s in own) / first["parameters"],
        samples=len(own),
        step_seconds=statistics.median(_per_step(s) for s in own),
        parameters=first["parameters"],
    )


def _per_step(sample: dict[str, Any]) -> float:
    return float(sample["seconds"] / sample["steps"])


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
