"""The measured time of a step against the speed of the link, a line a method.

Reads the tables that the benchmark wrote beside the page, so that picture and tables agree.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pictures.paper import INK, SMALL, TEXT

__all__ = ["draw"]

_TABLES = Path(__file__).parents[1] / "performance" / "tables.inc"
_RATES = {"50mbit": "50 Mbit/s", "200mbit": "200 Mbit/s", "1gbit": "1 Gbit/s"}
_WIDTH_IN = 4.5


@dataclass(frozen=True)
class Line:
    """A method: its row in the tables, its name in the picture, and how it is drawn."""

    row: str
    label: str
    dashes: str
    marker: str
    width: float = 1.2


_LINES = (
    Line("DDP", "DDP", "-", "o"),
    Line("DDP, fp16", "DDP, gradients in fp16", "--", "o"),
    Line("commhooks LocalSGD", "LocalSGD, tau=8", "-.", "s"),
    Line("DDP, PowerSGD", "DDP, PowerSGD", ":", "^"),
    Line("commhooks OverlapLocalSGD, beta=0.7", "OverlapLocalSGD, tau=8", "-", "D", 2.4),
    Line("commhooks OverlapLocalSGD, int8", "the same, int8", "--", "D", 2.4),
)


def draw() -> Figure:
    """Two workers, 11 M parameters; the rates are a category each, four or five times apart."""
    figure = Figure(figsize=(_WIDTH_IN, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tables = _TABLES.read_text()
    for line in _LINES:
        times = [_measured(tables, rate, line.row) for rate in _RATES]
        axes.plot(
            list(_RATES.values()),
            times,
            color=INK,
            linestyle=line.dashes,
            linewidth=line.width,
            marker=line.marker,
            markersize=4,
            markerfacecolor=INK if line.width > 2 else "white",
            label=line.label,
        )
    axes.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    axes.annotate(
        "no communication",
        (0.02, 1),
        (0, -3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=SMALL,
        color="0.35",
        va="top",
    )
    axes.margins(x=0.08)
    axes.set_yscale("log")
    axes.set_ylim(0.75, 40)
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.tick_params(labelsize=SMALL)
    axes.grid(color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("time of a step (1: nothing is sent)", fontsize=SMALL)
    axes.set_xlabel("what a worker can send", fontsize=SMALL)
    figure.suptitle("The slower the link, the longer DDP's step", fontsize=TEXT, weight="bold")
    figure.legend(loc="outside lower center", ncols=2, fontsize=SMALL, frameon=False)
    return figure


def _measured(tables: str, rate: str, row: str) -> float:
    """The median of ``row`` in the table of the pretend accelerator, 2 ranks, at ``rate``."""
    table = tables.split(f"### pretend, 2 ranks, {rate}\n", 1)[1].split("\n### ", 1)[0]
    found = re.search(rf"^\| {re.escape(row)} \| ([\d.]+) \|", table, re.MULTILINE)
    if found is None:
        raise ValueError(f"{_TABLES.name} has no row {row!r} at {rate}")
    return float(found[1])
