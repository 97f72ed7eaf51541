"""What a grid came to: figures and curves of every cell, over its seeds."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.traffic import ring_bytes
from comparison.grid import Cell
from comparison.recorded import RecordedRun

__all__ = ["AXES", "Axis", "CellResult", "Curve", "Spread", "best_rates", "spread", "sweeps_rates"]

Record = Mapping[str, Any]

# Final results that are None where nobody measures them, and never NaN.
_MAYBE_UNMEASURED = ("accuracy", "seconds_exposed", "seconds_hidden")


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of a figure over seeds; of one there is no deviation."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Curve:
    """A metric against an axis: means over seeds, and the least and the most."""

    x: list[float]
    y: list[float]
    least: list[float]
    most: list[float]


@dataclass(frozen=True)
class Axis:
    """Something a record can be placed by: its label with the unit, and its value.

    On a ``logarithmic`` one there is no place for a record at 0.
    """

    label: str
    value: Callable[[RecordedRun, Record], float]
    logarithmic: bool = False


@dataclass(frozen=True)
class CellResult:
    """A cell and its runs that are complete, one a seed."""

    cell: Cell
    runs: tuple[RecordedRun, ...]

    def figure(self, name: str) -> Spread | None:
        """A final result such as ``accuracy``; None where no run has measured it."""
        key = f"final/{name}"
        values = [_number(run.summary[key]) for run in self.runs if key in run.summary]
        if name in _MAYBE_UNMEASURED:
            values = [value for value in values if not math.isnan(value)]
        return spread(values) if values else None

    def reached(self, metric: str, level: float, axis: Axis) -> Spread | None:
        """Where along ``axis`` a metric was at ``level`` first; None if a run never was."""
        firsts = [
            axis.value(run, record)
            for run in self.runs
            for record in [next((r for r in run.history if r.get(metric, 0.0) >= level), None)]
            if record is not None
        ]
        return spread(firsts) if len(firsts) == len(self.runs) else None

    def curve(self, metric: str, axis: Axis) -> Curve:
        """A metric such as ``eval/loss`` against ``axis``; its points are those all seeds have.

        Point k of the mean is the mean of the seeds' points k, along both axes.
        """
        courses = [
            [
                (axis.value(run, record), float(record[metric]))
                for record in run.history
                if metric in record
            ]
            for run in self.runs
        ]
        points = list(zip(*courses, strict=False))
        if axis.logarithmic:
            points = [point for point in points if all(x > 0 for x, _ in point)]
        return Curve(
            x=[statistics.fmean(x for x, _ in point) for point in points],
            y=[statistics.fmean(y for _, y in point) for point in points],
            least=[min(y for _, y in point) for point in points],
            most=[max(y for _, y in point) for point in points],
        )


def sweeps_rates(results: Iterable[CellResult]) -> bool:
    """Whether something was run at several learning rates, and not at its best one alone."""
    cells = [replace(result.cell, lr=None) for result in results]
    return len({*cells}) < len(cells)


def best_rates(results: Iterable[CellResult]) -> tuple[Cell, ...]:
    """Of the cells that differ in nothing but the learning rate, the one with the least loss."""
    best: dict[Cell, tuple[float, Cell]] = {}
    for result in results:
        figure = result.figure("loss")
        loss = math.inf if figure is None or math.isnan(figure.mean) else figure.mean
        place = replace(result.cell, lr=None)
        if place not in best or loss < best[place][0]:
            best[place] = loss, result.cell
    return tuple(cell for _, cell in best.values())


def spread(values: Sequence[float]) -> Spread:
    """Mean and spread of some values, at least one."""
    finite = all(math.isfinite(value) for value in values)
    # A run that diverged is no outlier to be left out: the mean says so.
    mean = statistics.fmean(values) if finite else math.nan
    deviation = statistics.stdev(values) if finite and len(values) > 1 else None
    return Spread(mean, deviation, len(values))


def _number(value: Any) -> float:
    """A number as W&B 0.31 writes it: infinity as a string, NaN in a summary as null."""
    return math.nan if value is None else float(value)


def _steps(run: RecordedRun, record: Record) -> float:
    return float(record["train/step"])


def _seconds(run: RecordedRun, record: Record) -> float:
    return float(record["time/seconds"])


def _megabytes(run: RecordedRun, record: Record) -> float:
    """What a worker has sent so far, in units of 1e6 bytes."""
    if "comm/bytes_reduced" in record:
        workers: int = run.config["workers"]
        return ring_bytes(float(record["comm/bytes_reduced"]), workers) / 1e6
    # Plain DDP keeps no count, but sends the same at every step.
    share: float = record["train/step"] / run.history[-1]["train/step"]
    return float(run.summary["final/megabytes_sent"]) * share


AXES = {
    "steps": Axis("optimizer steps", _steps),
    "seconds": Axis("training time (s)", _seconds),
    "megabytes": Axis("sent by each worker (MB)", _megabytes, logarithmic=True),
}
