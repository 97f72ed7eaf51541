"""The sheet that every picture is drawn on: its width, its letters, and how it is kept.

Black on white with hatching in place of colours, so that print and dark pages both show it; narrow,
so that a phone shows it at nearly its own size.
"""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["INK", "SHADE", "SMALL", "TEXT", "save", "sheet"]

INK = "black"
SHADE = "0.85"
TEXT = 9
SMALL = 7.5
_WIDTH_IN = 4.5


def sheet(width: float, height: float) -> tuple[Figure, Axes]:
    """A drawing area of ``width`` x ``height`` units, equally long both ways, y downwards."""
    figure = Figure(figsize=(_WIDTH_IN, _WIDTH_IN * height / width))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write an SVG that is the same, byte for byte, every time; a PNG where the name says so."""
    vector = path.suffix == ".svg"
    with mpl.rc_context({"svg.hashsalt": path.stem, "hatch.linewidth": 0.6}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if vector else None)
