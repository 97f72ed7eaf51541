"""A profile of some rounds as a picture: steps above, what is in flight under them below."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

__all__ = ["draw_timeline"]

_LAUNCH, _CHAIN = "commhooks::launch", "commhooks::chain"
_BOUNDARY = "commhooks::"
_LOOKS: dict[str, dict[str, Any]] = {
    "forward": {"facecolor": "white"},
    "backward": {"facecolor": "0.8"},
    "optimizer": {"facecolor": "0.5"},
    "boundary": {"facecolor": "black"},
    "all-reduce": {"facecolor": "white", "hatch": "////"},
    "chained update": {"facecolor": "black"},
}

_Interval = tuple[float, float]


def draw_timeline(spans: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rank 0's training thread, and a line for every bucket that is in flight.

    An all-reduce lasts from its launch on the training thread to what is chained to it, which the
    backend's thread runs on its arrival.
    """
    training = min(span["thread"] for span in spans)
    steps = {name: _intervals(spans, name) for name in ("forward", "backward", "optimizer")}
    steps["boundary"] = [
        (span["start"], span["end"])
        for span in spans
        if span["name"].startswith(_BOUNDARY) and span["thread"] == training
    ]
    launches = [end for _, end in _intervals(spans, _LAUNCH)]
    chains = _intervals(spans, _CHAIN)
    end = max(span["end"] for span in spans)
    rows = _buckets(launches, chains, end)
    figure = Figure(figsize=(6.4, 1.5 + 0.35 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, intervals in steps.items():
        _bars(axes, 0, intervals, name)
    for number, row in enumerate(rows, start=1):
        _bars(axes, number, [flight for flight, _ in row], "all-reduce")
        _bars(axes, number, [chain for _, chain in row], "chained update")
    labels = ["training thread", *(f"bucket {number + 1}" for number in range(len(rows)))]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, end)
    axes.set_xlabel("seconds", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(label=name, edgecolor="black", **look) for name, look in _LOOKS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _intervals(spans: Sequence[Mapping[str, Any]], name: str) -> list[_Interval]:
    return sorted((span["start"], span["end"]) for span in spans if span["name"] == name)


def _buckets(
    launches: Sequence[float], chains: Sequence[_Interval], end: float
) -> list[list[tuple[_Interval, _Interval]]]:
    """Flights and chained updates, a list for every bucket, in the order of arrival.

    The last round is in flight still at the ``end``.
    """
    rows: list[list[tuple[_Interval, _Interval]]] = []
    for number, launch in enumerate((0.0, *launches)):
        until = launches[number] if number < len(launches) else float("inf")
        arrived = [chain for chain in chains if launch <= chain[0] < until]
        for bucket, chain in enumerate(arrived):
            if bucket == len(rows):
                rows.append([])
            rows[bucket].append(((launch, chain[0]), chain))
    for row in rows:
        row.append(((launches[-1], end), (end, end)))
    return rows


def _bars(axes: Axes, row: int, intervals: Sequence[_Interval], name: str) -> None:
    bars = [(start, end - start) for start, end in intervals]
    axes.broken_barh(bars, (row - 0.35, 0.7), edgecolor="black", linewidth=0.5, **_LOOKS[name])
