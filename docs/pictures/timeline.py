"""One worker's time under DDP, Local SGD and Overlap-Local-SGD, to one scale.

Units: a step that does not communicate is 1 long.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, isclose

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pictures.paper import INK, SHADE, SMALL, TEXT, sheet

__all__ = ["draw"]

TAU = 4
# Long enough to show, short enough to hide under tau steps.
ALL_REDUCE = 2.6
# A third of a step is forward; DDP begins to send when backward has made its first bucket.
FORWARD = 1 / 3
CHAIN = 0.22
SPAN = 13.2

_LEFT = 0.35
_LANE = 0.62
_ROW = 3.05
_LOOKS = {"step": (SHADE, None), "all-reduce": ("white", "/////"), "chain": (INK, None)}


@dataclass(frozen=True)
class Bar:
    """A stretch of time on a lane: a step, an all-reduce, or the update chained to one."""

    kind: str
    start: float
    length: float
    label: str = ""


def ddp() -> Iterator[Bar]:
    """An all-reduce a step, as far as possible under its backward."""
    period = FORWARD + ALL_REDUCE
    for number in range(int(SPAN / period) + 1):
        yield Bar("step", number * period, 1, str(number + 1))
        yield Bar("all-reduce", number * period + FORWARD, ALL_REDUCE)


def local_sgd() -> Iterator[Bar]:
    """tau steps, then an all-reduce that is waited for."""
    period = TAU + ALL_REDUCE
    for number in range(2 * TAU):
        start = number // TAU * period + number % TAU
        yield Bar("step", start, 1, str(number + 1))
    for number in range(2):
        yield Bar("all-reduce", TAU + number * period, ALL_REDUCE, f"round {number + 1}")


def overlapped() -> Iterator[Bar]:
    """Steps without a pause; each round is in flight under the next tau."""
    for number in range(ceil(SPAN)):
        yield Bar("step", number, 1, str(number + 1))
    for number in range(1, ceil(SPAN / TAU)):
        yield Bar("all-reduce", number * TAU, ALL_REDUCE, f"round {number}")
        yield Bar("chain", number * TAU + ALL_REDUCE, CHAIN)


def draw() -> Figure:
    """The three, one below the other."""
    rows = (
        ("DDP: waits at every step", ddp(), ()),
        (
            f"Local SGD, tau={TAU}: waits at every boundary",
            local_sgd(),
            (TAU, 2 * TAU + ALL_REDUCE),
        ),
        (f"Overlap-Local-SGD, tau={TAU}: does not wait", overlapped(), (TAU, 2 * TAU, 3 * TAU)),
    )
    figure, axes = sheet(SPAN + 2 * _LEFT, len(rows) * _ROW + 1.75)
    for number, (title, bars, boundaries) in enumerate(rows):
        top = 0.75 + number * _ROW
        axes.text(_LEFT, top, title, fontsize=TEXT, weight="bold", va="center")
        for bar in bars:
            _bar(axes, bar, top + 0.5)
        for boundary in boundaries:
            _mark(axes, _LEFT + boundary, top + 0.38, top + 0.84 + 2 * _LANE)
    _key(axes, len(rows) * _ROW + 0.55)
    return figure


def _bar(axes: Axes, bar: Bar, top: float) -> None:
    length = min(bar.length, SPAN - bar.start)
    if length <= 0:
        return
    y = top if bar.kind == "step" else top + _LANE + 0.12
    _patch(axes, bar.kind, _LEFT + bar.start, y, length)
    if bar.label and isclose(length, bar.length):
        # A white ground keeps letters legible on the hatching.
        ground = None if bar.kind == "step" else {"fc": "white", "ec": "none", "pad": 1.2}
        x, middle = _LEFT + bar.start + length / 2, y + _LANE / 2
        axes.text(x, middle, bar.label, fontsize=SMALL, ha="center", va="center", bbox=ground)


def _patch(axes: Axes, kind: str, x: float, y: float, length: float, height: float = _LANE) -> None:
    face, hatch = _LOOKS[kind]
    axes.add_patch(Rectangle((x, y), length, height, fc=face, ec=INK, lw=0.8, hatch=hatch))


def _mark(axes: Axes, x: float, top: float, bottom: float) -> None:
    axes.plot([x, x], [top, bottom], color=INK, lw=1.8)


def _key(axes: Axes, top: float) -> None:
    """What is what, in two lines of two."""
    entries = (
        ("step", "a step's compute", 0.0, 0),
        ("all-reduce", "an all-reduce", 6.6, 0),
        ("chain", "the update chained to it", 0.0, 1),
        ("boundary", "a boundary", 6.6, 1),
    )
    for kind, label, left, line in entries:
        x, y = _LEFT + left, top + line * 0.62
        if kind == "boundary":
            _mark(axes, x + 0.35, y - 0.25, y + 0.25)
        else:
            length = CHAIN if kind == "chain" else 0.7
            _patch(axes, kind, x + (0.7 - length) / 2, y - 0.2, length, 0.4)
        axes.text(x + 0.9, y, label, fontsize=SMALL, va="center")
