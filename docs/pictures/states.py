"""What a state does between its registration and the end of training."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from pictures.paper import INK, SHADE, SMALL, TEXT, sheet

__all__ = ["draw"]

_HALF_HEIGHT = 0.52
_STYLE = {"arrowstyle": "-|>", "color": INK, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}


def draw() -> Figure:
    """The order of a run from top to bottom, and what happens beside it on the right."""
    figure, axes = sheet(13.0, 11.2)
    _box(axes, 3.2, 0.8, 6.2, "a new state", "plain values, no tensors, no ranks")
    _box(axes, 3.2, 3.2, 6.2, "warm-up", "gradients are averaged, as in DDP")
    _box(axes, 3.2, 5.6, 6.2, "local steps", "gradients stay where they are", shaded=True)
    _box(axes, 3.2, 8.0, 6.2, "consensus", "the mean, on every rank")
    _box(axes, 3.2, 10.4, 6.2, "plain DDP", "gradients are averaged, for good")
    _box(
        axes,
        10.8,
        2.6,
        4.2,
        "RoundError",
        "parameters stay as\nthe optimizer left them",
        black=True,
    )
    _box(axes, 10.8, 5.6, 4.2, "boundary", "wait, mix,\nlaunch the next round", shaded=True)
    _box(axes, 10.8, 8.7, 4.2, "averaged()", "the mean for a while,\nthen back bit for bit")

    _arrow(axes, (3.2, 1.32), (3.2, 2.68), "register()", (3.4, 2.0))
    _arrow(axes, (3.2, 3.72), (3.2, 5.08), "after warmup_steps", (3.4, 4.4))
    _arrow(axes, (6.3, 5.4), (8.7, 5.4), "tau steps", (7.45, 5.08), "center")
    _arrow(axes, (8.7, 5.8), (6.3, 5.8), "and on", (7.5, 6.12), "center")
    _arrow(axes, (10.8, 4.88), (10.8, 3.32), "a round failed", (10.6, 4.1), "right")
    _arrow(axes, (2.2, 6.12), (2.2, 7.48), "finish()", (2.0, 6.8), "right")
    _arrow(axes, (4.2, 7.48), (4.2, 6.12), "begin anew", (4.4, 6.8))
    _arrow(axes, (3.2, 8.52), (3.2, 9.88), "disable()", (3.4, 9.2))
    axes.annotate("", (8.7, 8.1), (6.15, 6.15), arrowprops=_STYLE | {"arrowstyle": "<|-|>"})
    return figure


def _box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    title: str,
    text: str,
    *,
    shaded: bool = False,
    black: bool = False,
) -> None:
    half = _HALF_HEIGHT + 0.2 * text.count("\n")
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2 + 0.15, y - half + 0.15),
            width - 0.3,
            2 * half - 0.3,
            boxstyle="round,pad=0.15",
            facecolor=INK if black else SHADE if shaded else "white",
            edgecolor=INK,
            linewidth=0.9,
        )
    )
    ink = "white" if black else INK
    rise = 0.2 + 0.2 * text.count("\n")
    axes.text(x, y - rise, title, fontsize=TEXT, weight="bold", color=ink, ha="center", va="center")
    axes.text(x, y + 0.25, text, fontsize=SMALL, color=ink, ha="center", va="center")


def _arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    label: str,
    at: tuple[float, float],
    side: str = "left",
) -> None:
    axes.annotate("", end, start, arrowprops=_STYLE)
    axes.text(*at, label, fontsize=SMALL, ha=side, va="center")
