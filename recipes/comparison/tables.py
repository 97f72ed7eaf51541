"""A grid's figures as tables: in the terminal, and as Markdown."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.table import Table

from common.markdown import machine, markdown_table
from comparison.grid import Cell
from comparison.results import AXES, CellResult, sweeps_rates

__all__ = ["NOTE", "Measure", "markdown", "quality_of", "terminal_tables"]


@dataclass(frozen=True)
class Measure:
    """A final result: how it is headed, scaled and rounded."""

    name: str
    heading: str
    scale: float = 1.0
    digits: int = 2
    spread: bool = True

    @property
    def slug(self) -> str:
        """Its part of a file's name."""
        return self.name.replace("_", "-")

    def text(self, result: CellResult) -> str:
        """Mean and spread; "-" where nobody measured it."""
        figure = result.figure(self.name)
        if figure is None:
            return "-"
        if math.isnan(figure.mean):
            return "diverged"
        mean = f"{figure.mean * self.scale:,.{self.digits}f}"
        if figure.deviation is None or not self.spread:
            return mean
        # Without blanks, at which a page would break it.
        return f"{mean}±{figure.deviation * self.scale:.{self.digits}f}"


# What says how good a model is; the first that a recipe measures counts.
_QUALITIES = (
    Measure("accuracy", "test accuracy (%)", 100, 1),
    Measure("bits_per_byte", "bits per byte", 1, 3),
    Measure("loss", "test loss", 1, 3),
)
_OTHERS = (
    Measure("loss", "test loss", 1, 3),
    Measure("train_loss", "training loss", 1, 3),
    Measure("seconds", "training time (s)", 1, 1),
    Measure("seconds_exposed", "exposed (s)"),
    Measure("seconds_hidden", "hidden (s)"),
    Measure("megabytes_sent", "sent by each (MB)", 1, 1, spread=False),
)
# What a model on the digits should reach.
_GOOD = 0.95
NOTE = (
    "Mean ± sample standard deviation over seeds, of the consensus model. Exposed: time a worker "
    "waited for communication; hidden: time communication was in flight while training went on; "
    "-: not measured."
)
# Title, head and rows.
_Table = tuple[str, list[str], list[list[str]]]


def terminal_tables(results: Sequence[CellResult], title: str) -> list[Table]:
    """Tables for the terminal."""
    tables = []
    for heading, head, rows in _tables(results, narrow=True):
        table = Table(
            title=f"{title}: {heading}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for number, column in enumerate(head):
            justify: Literal["left", "right"] = "right" if number else "left"
            # Where the terminal is too narrow names are wrapped, and never a figure cut.
            table.add_column(column.replace(" ", "\n"), justify=justify, no_wrap=number > 0)
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    tables[-1].caption, tables[-1].caption_justify = NOTE, "left"
    return tables


def markdown(results: Sequence[CellResult], *, command: str, details: str) -> str:
    """The same tables as a part of a page, with where they come from."""
    parts = [f"Printed by `{command}` on {machine()}. {details} {NOTE}"]
    for heading, head, rows in _tables(results):
        parts += [f"**{heading[0].upper()}{heading[1:]}**", markdown_table(head, rows)]
    return "\n\n".join(parts) + "\n"


def _tables(results: Sequence[CellResult], *, narrow: bool = False) -> list[_Table]:
    """First how good the models are, side by side, and then all figures, for every partition."""
    quality = quality_of(results)
    partitions = list(dict.fromkeys(result.cell.partition for result in results))
    shares = {p: [r for r in results if r.cell.partition == p] for p in partitions}
    tables = []
    if len({result.cell.tau for result in results} - {None}) > 1:
        tables += [_over_tau(quality, partition, share) for partition, share in shares.items()]
    if sweeps_rates(results):
        tables += [_over_lr(quality, partition, share) for partition, share in shares.items()]
    return tables + [_figures(quality, p, share, narrow=narrow) for p, share in shares.items()]


def quality_of(results: Sequence[CellResult]) -> Measure:
    """What says how good these models are."""
    measured = (
        figure
        for figure in _QUALITIES
        if any(result.figure(figure.name) is not None for result in results)
    )
    return next(measured, _QUALITIES[-1])


def _over_tau(quality: Measure, partition: str, results: Sequence[CellResult]) -> _Table:
    """One row a method and learning rate, one column a tau."""
    # 0 for those that synchronise at every step.
    columns: dict[float, str] = {
        tau: f"tau={tau}" if tau else "every step"
        for tau in sorted({result.cell.tau or 0 for result in results})
    }

    # Of what was run at its best learning rate alone, the table of all figures has that.
    left_out = ("tau", "partition") if sweeps_rates(results) else ("tau", "partition", "lr")

    def place(cell: Cell) -> tuple[str, float]:
        return cell.name(*left_out), cell.tau or 0

    return _side_by_side(quality, partition, results, columns, place)


def _over_lr(quality: Measure, partition: str, results: Sequence[CellResult]) -> _Table:
    """One row a method and tau, one column a learning rate."""
    columns = {lr: f"lr={lr:g}" for lr in sorted({r.cell.lr for r in results if r.cell.lr})}

    def place(cell: Cell) -> tuple[str, float]:
        return cell.name("lr", "partition"), cell.lr or 0

    return _side_by_side(quality, partition, results, columns, place)


def _side_by_side(
    quality: Measure,
    partition: str,
    results: Sequence[CellResult],
    columns: Mapping[float, str],
    place: Callable[[Cell], tuple[str, float]],
) -> _Table:
    """How good the models are, each where ``place`` puts its cell: a row and a column."""
    found = {place(result.cell): quality.text(result) for result in results}
    rows = [
        [row, *(found.get((row, column), "") for column in columns)]
        for row in dict.fromkeys(row for row, _ in found)
    ]
    return f"{quality.heading}, {partition}", ["", *columns.values()], rows


def _figures(
    quality: Measure, partition: str, results: Sequence[CellResult], *, narrow: bool
) -> _Table:
    """One row a cell."""
    figures = [quality, *(figure for figure in _OTHERS if figure.name != quality.name)]
    head = ["", "tau", "lr", *(figure.heading for figure in figures), "seeds"]
    rows = [
        [
            result.cell.method.label,
            "-" if result.cell.tau is None else str(result.cell.tau),
            "-" if result.cell.lr is None else f"{result.cell.lr:g}",
            *(figure.text(result) for figure in figures),
            str(len(result.runs)),
        ]
        for result in results
    ]
    if quality.name == "accuracy" and not narrow:
        head = [*head, f"sent until {_GOOD:.0%} (MB)"]
        for row, result in zip(rows, results, strict=True):
            sent = result.reached("eval/accuracy", _GOOD, AXES["megabytes"])
            row.append("never" if sent is None else f"{sent.mean:,.1f}")
    # Mostly all of a grid have one learning rate, and its options say which.
    if all(result.cell.lr is None for result in results):
        head, rows = _without(2, head), [_without(2, row) for row in rows]
    return partition, head, rows


def _without(column: int, row: list[str]) -> list[str]:
    return [*row[:column], *row[column + 1 :]]
