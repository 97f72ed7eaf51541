"""The benchmark's results as a picture that survives a black-and-white printer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmark.results import Cell, Line

__all__ = ["draw"]

# Shape and filling tell the kinds apart without colour.
_MARKERS = {
    "none": ("|", "none"),
    "alone": ("|", "none"),
    "step": ("x", "none"),
    "blocking": ("s", "none"),
}
_OVERLAPPED = ("o", "full")
# As many as can be read at a page's width.
_COLUMNS = 2
_LABELS = {
    "step": "waits at every step",
    "blocking": "waits every tau steps",
    "overlapped": "communicates under the steps",
}


def draw(results: Mapping[Cell, Sequence[Line]], tau: int, path: Path) -> None:
    """One panel a cell, one row a contender; a dot at the median, a bar from least to most."""
    names = list(dict.fromkeys(line.contender for lines in results.values() for line in lines))
    columns = min(_COLUMNS, len(results))
    rows = -(-len(results) // columns)
    size = (3.2 + 2.6 * columns, 0.8 + (0.5 + 0.24 * len(names)) * rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for panel in panels[len(results) :]:
        panel.set_axis_off()
    for panel, (cell, lines) in zip(panels, results.items(), strict=False):
        panel.set_title(cell.title, fontsize=9)
        panel.axvline(1.0, color="0.6", linewidth=0.8)
        for line in lines:
            row = len(names) - 1 - names.index(line.contender)
            median, least, most = line.multiple
            marker, filling = _MARKERS.get(line.kind, _OVERLAPPED)
            panel.plot([least, most], [row, row], color="black", linewidth=1)
            panel.plot(median, row, marker=marker, fillstyle=filling, color="black", markersize=6)
            panel.annotate(
                f"{median:.2f}",
                (most, row),
                (6, 0),
                textcoords="offset points",
                fontsize=7,
                verticalalignment="center",
            )
        panel.set_xscale("log")
        most = max(line.multiple[2] for line in lines)
        panel.set_xlim(0.9, 1.8 * most)
        panel.set_xticks([tick for tick in (1, 2, 4, 8, 16, 32) if tick <= 1.8 * most])
        panel.xaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), reversed(names))
    figure.supxlabel(f"step time, in units of no communication (tau={tau})", fontsize=9)
    figure.legend(handles=_legend(), loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _legend() -> list[Line2D]:
    entries = []
    for kind, label in _LABELS.items():
        marker, filling = _MARKERS.get(kind, _OVERLAPPED)
        entries.append(
            Line2D(
                [],
                [],
                color="black",
                linestyle="none",
                marker=marker,
                label=label,
                fillstyle="none" if filling == "none" else "full",
            )
        )
    return entries
