"""A figure with a panel for every tau and partition, and one legend for all."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from comparison.results import CellResult
from comparison.style import FONT_SIZE, Look

__all__ = ["Panel", "canvas", "label_axes", "legend_of_lines", "log_ticks", "panels_of", "save"]

# Widths of one and of two columns of a paper, in inches.
_ONE_COLUMN = 3.4
_TWO_COLUMNS = 7.0
_DPI = 200
_LEGEND_ROW = 0.18
# Ratio of an axis' ends from which only powers of ten are written.
_MANY_TICKS = 60
# Ratio up to which three ticks at 1, 2, 5, 10, ... may not fall between the ends.
_SHORT = 4
_SHORT_TICKS = 5


@dataclass(frozen=True)
class Panel:
    """One panel's results, and what to write above it where there are several."""

    title: str
    results: tuple[CellResult, ...]


def panels_of(results: Sequence[CellResult]) -> list[list[Panel]]:
    """A row a partition, a column a tau; who has no tau is in all of its row."""
    taus: list[int | None] = [*sorted({r.cell.tau for r in results if r.cell.tau is not None})]
    partitions = list(dict.fromkeys(result.cell.partition for result in results))
    return [
        [
            Panel(
                ", ".join([partition, *([] if tau is None else [f"tau={tau}"])]),
                tuple(
                    r
                    for r in results
                    if r.cell.partition == partition and r.cell.tau in (tau, None)
                ),
            )
            for tau in taus or [None]
        ]
        for partition in partitions
    ]


@contextmanager
def canvas(
    rows: int, columns: int, *, height: float, legend_rows: int, sharey: bool = True
) -> Iterator[tuple[Figure, list[list[Axes]]]]:
    """A figure of ``rows`` times ``columns`` panels of a ``height`` in inches, to be filled.

    The panels of a row share their axes, the y axis only with ``sharey``.
    """
    width = _ONE_COLUMN if columns == 1 else _TWO_COLUMNS
    size = (width, height * rows + 0.25 + _LEGEND_ROW * legend_rows)
    with mpl.rc_context():
        # Not by the context's argument, whose type wants every key spelled out.
        mpl.rcParams["font.size"] = mpl.rcParams["axes.titlesize"] = FONT_SIZE
        mpl.rcParams["hatch.linewidth"] = 0.6
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(
            rows, columns, sharex="row", sharey="row" if sharey else False, squeeze=False
        )
        for panel in axes.flat:
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=FONT_SIZE - 1)
            panel.grid(color="0.9", linewidth=0.5)
            panel.set_axisbelow(True)
        yield figure, axes.tolist()


def label_axes(axes: Sequence[Sequence[Axes]], x: str, y: str | None) -> None:
    """Write what is drawn, with its unit, below the lowest panels and beside the leftmost."""
    for panel in axes[-1]:
        panel.set_xlabel(x)
    if y is not None:
        for row in axes:
            row[0].set_ylabel(y)


def log_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5, 10, ..., or where that is too many at 1, 10, ...

    Between two of these an axis would be bare: a short one is divided evenly.
    """
    low, high = axis.get_view_interval()
    multiples = (1, 2, 5) if high / low < _MANY_TICKS else (1,)
    nice = [multiple * 10.0**power for power in range(-9, 10) for multiple in multiples]
    if high / low < _SHORT:
        nice = list(MaxNLocator(_SHORT_TICKS).tick_values(low, high))
    axis.set_ticks([tick for tick in nice if low <= tick <= high])
    axis.set_ticks([], minor=True)
    axis.set_major_formatter("{x:g}")


def legend_of_lines(figure: Figure, looks: Mapping[str, Look], columns: int) -> None:
    """Every label's line, below the panels."""
    handles = [Line2D([], [], label=label, **look.line()) for label, look in looks.items()]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        # A single column is for labels that have no room beside each other, and hardly alone.
        fontsize=FONT_SIZE - (1 if columns > 1 else 2),
        handlelength=3.2,
        columnspacing=1.2,
    )


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
