"""Who sends what to whom, where several ranks make one worker."""

from collections.abc import Iterator
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from pictures.paper import INK, SHADE, SMALL, TEXT, sheet

__all__ = ["draw"]

ISLANDS = 2
RANKS = 4

_WIDTH = 13.0
_HEIGHT = 10.6
_TOPS = (0.25, 6.4)
# The ranks of both face the network between them; what is written lies on the far side.
_RANKS_AT, _TITLE_AT, _LABEL_AT = (1.5, 0.25), (0.45, 2.85), (1.05, 2.25)
_ISLAND_HEIGHT = 3.2
_RANK_WIDTH, _RANK_HEIGHT = 2.3, 1.45
_STYLE = {"arrowstyle": "<|-|>", "color": INK, "shrinkA": 0, "shrinkB": 0}


def draw() -> Figure:
    """Two machines, one below the other, and what goes between their ranks."""
    figure, axes = sheet(_WIDTH, _HEIGHT)
    for number, top in enumerate(_TOPS):
        _island(axes, number, top)
    for x in _centres():
        start, end = _TOPS[0] + _RANKS_AT[0] + _RANK_HEIGHT, _TOPS[1] + _RANKS_AT[1]
        axes.annotate("", (x, end), (x, start), arrowprops=_STYLE | {"linewidth": 0.9})
    axes.text(
        _WIDTH / 2,
        (_TOPS[0] + _ISLAND_HEIGHT + _TOPS[1]) / 2,
        f"slow network, every tau steps: parameters,\neach rank its own 1/{RANKS} of the model",
        fontsize=TEXT,
        ha="center",
        va="center",
        bbox={"fc": "white", "ec": "none", "pad": 3},
    )
    axes.add_patch(Rectangle((0.5, 9.95), 0.4, 0.36, fc=SHADE, ec=INK, lw=0.8))
    axes.text(
        1.1, 10.13, "the share of the model that a rank averages", fontsize=SMALL, va="center"
    )
    return figure


def _centres() -> Iterator[float]:
    """Where the ranks of an island lie, from left to right."""
    step = _WIDTH / RANKS
    yield from (step * (place + 0.5) for place in range(RANKS))


def _island(axes: Axes, number: int, top: float) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (0.3, top + 0.15),
            _WIDTH - 0.6,
            _ISLAND_HEIGHT - 0.3,
            boxstyle="round,pad=0.15",
            facecolor="white",
            edgecolor=INK,
            linewidth=0.9,
        )
    )
    title = f"machine {number + 1}: an island, one worker"
    axes.text(0.5, top + _TITLE_AT[number], title, fontsize=TEXT, weight="bold", va="center")
    centres = list(_centres())
    ranks_at = top + _RANKS_AT[number]
    middle = ranks_at + _RANK_HEIGHT / 2
    for place, x in enumerate(centres):
        _rank(axes, x, ranks_at, number * RANKS + place, place)
    for left, right in pairwise(centres):
        axes.annotate(
            "",
            (right - _RANK_WIDTH / 2, middle),
            (left + _RANK_WIDTH / 2, middle),
            arrowprops=_STYLE | {"linewidth": 2.2},
        )
    label = "fast bus, every step: gradients, averaged inside the island"
    axes.text(0.5, top + _LABEL_AT[number], label, fontsize=SMALL, va="center")


def _rank(axes: Axes, x: float, top: float, number: int, place: int) -> None:
    """A rank, with its share of the model among the shares of the others."""
    left = x - _RANK_WIDTH / 2
    axes.add_patch(Rectangle((left, top), _RANK_WIDTH, _RANK_HEIGHT, fc="white", ec=INK, lw=0.9))
    axes.text(x, top + 0.4, f"rank {number}", fontsize=SMALL, ha="center", va="center")
    cell = (_RANK_WIDTH - 0.5) / RANKS
    for share in range(RANKS):
        axes.add_patch(
            Rectangle(
                (left + 0.25 + share * cell, top + 0.75),
                cell,
                0.45,
                fc=SHADE if share == place else "white",
                ec=INK,
                lw=0.8,
            )
        )
