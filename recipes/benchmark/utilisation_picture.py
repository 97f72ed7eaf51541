"""Utilisation against bandwidth, a panel for every tau."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from benchmark.contenders import INT4, INT8, TORCHFT_DELAYED
from benchmark.utilisation import Point
from comparison.panels import canvas, label_axes, legend_of_lines, save
from comparison.style import Look

__all__ = ["draw_utilisation"]

# The colours of the same methods in the comparisons; shapes and dashes tell all apart without them.
_LOOKS = {
    "DDP": Look("#000000", "-", "x", hollow=False),
    "torch post_localSGD, averager": Look("#E69F00", (0, (4, 1.5)), "s", hollow=False),
    TORCHFT_DELAYED: Look("#56B4E9", (0, (6, 2)), "P", hollow=True),
    "commhooks OverlapLocalSGD": Look("#0072B2", "-", "o", hollow=False),
    INT8: Look("#0072B2", (0, (2.5, 1)), "o", hollow=True),
    INT4: Look("#003F62", (0, (1, 1.5)), "*", hollow=False),
}
_HEIGHT = 2.0
_LEGEND_COLUMNS = 3


def draw_utilisation(
    points: Sequence[Point], rates: Mapping[str, float], taus: Sequence[int], path: Path
) -> None:
    """One line a contender; DDP, which has no tau, is in every panel.

    Args:
        points: what was measured.
        rates: Mbit/s of every rate.
        taus: one panel each.
        path: the PNG.
    """
    looks = {n: look for n, look in _LOOKS.items() if any(p.contender == n for p in points)}
    rows = -(-len(looks) // _LEGEND_COLUMNS)
    with canvas(1, len(taus), height=_HEIGHT, legend_rows=rows) as (figure, axes):
        for panel, tau in zip(axes[0], taus, strict=True):
            panel.set_title(f"tau={tau}")
            own = [point for point in points if point.tau in (tau, None)]
            for name, look in looks.items():
                _line(panel, [point for point in own if point.contender == name], rates, look)
            panel.set_xscale("log")
            panel.set_ylim(0, 105)
            _ticks(panel, list(rates.values()))
        label_axes(axes, "link of a worker (Mbit/s)", "time spent computing (%)")
        legend_of_lines(figure, looks, _LEGEND_COLUMNS)
        save(figure, path)


def _line(axes: Axes, points: Sequence[Point], rates: Mapping[str, float], look: Look) -> None:
    if points:
        places = sorted((rates[point.rate], 100 * point.utilisation) for point in points)
        x, y = zip(*places, strict=True)
        axes.plot(x, y, **look.line())


def _ticks(axes: Axes, megabits: Sequence[float]) -> None:
    """A tick at every second rate or so: more have no room in a panel."""
    shown = sorted(megabits)[:: 1 + len(megabits) // 5]
    axes.set_xticks(shown, [f"{rate:g}" for rate in shown])
    axes.set_xticks([], minor=True)
