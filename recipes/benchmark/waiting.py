"""How long workers wait for a slow one: figures, table and picture."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmark.contenders import BASELINE
from benchmark.slow_worker import Case
from common.markdown import markdown_table
from comparison.panels import canvas, label_axes, save
from comparison.style import FONT_SIZE

__all__ = ["TITLES", "Waiting", "draw_waiting", "waiting_of", "waiting_table"]

TITLES: Mapping[Case, str] = {
    "slower": "one twice as slow",
    "stopped": "one stops now and then",
    "in-turn": "each stops in turn",
}


@dataclass(frozen=True)
class Waiting:
    """What a contender's workers wait in one case, those that are never slow alone.

    Attributes:
        case: in which way a worker is slow.
        contender: its name.
        per_step: seconds a step takes over no communication, mean over the workers.
        share: of all their time.
    """

    case: Case
    contender: str
    per_step: float
    share: float


def waiting_of(records: Sequence[Mapping[str, Any]]) -> list[Waiting]:
    """What the records of one case say, of all contenders but no communication.

    What a worker takes without communication is its own time, pauses included. All above it is
    waiting, and the little that the contender itself computes.
    """
    turns = [record["seconds"] for record in records if record["contender"] == BASELINE]
    alone = [statistics.median(rank) for rank in zip(*turns, strict=True)]
    found = []
    for record in records:
        if record["contender"] == BASELINE:
            continue
        pairs = list(zip(record["seconds"], alone, strict=True))
        if record["case"] != "in-turn":
            # The last one is waited for.
            pairs = pairs[:-1]
        # Less than nothing is noise.
        waited = [max(0.0, seconds - own) for seconds, own in pairs]
        found.append(
            Waiting(
                case=record["case"],
                contender=record["contender"],
                per_step=statistics.fmean(waited) / record["steps"],
                share=sum(waited) / sum(seconds for seconds, _ in pairs),
            )
        )
    return found


def waiting_table(found: Sequence[Waiting]) -> str:
    """A row a contender; of each case milliseconds a step, and the share of all time."""
    cases = list(dict.fromkeys(each.case for each in found))
    by_place = {(each.contender, each.case): each for each in found}
    head = [""]
    for case in cases:
        head += [f"{TITLES[case]}: ms a step", "% of its time"]
    rows = []
    for name in dict.fromkeys(each.contender for each in found):
        row = [name]
        for case in cases:
            each = by_place.get((name, case))
            row += (
                ["", ""]
                if each is None
                else [f"{1e3 * each.per_step:.1f}", f"{100 * each.share:.1f}"]
            )
        rows.append(row)
    return markdown_table(head, rows)


def draw_waiting(found: Sequence[Waiting], path: Path) -> None:
    """A panel a case, a bar a contender: the share of their time that workers wait."""
    names = list(dict.fromkeys(each.contender for each in found))
    cases = list(dict.fromkeys(each.case for each in found))
    with canvas(1, len(cases), height=0.35 + 0.2 * len(names), legend_rows=0) as (figure, axes):
        for panel, case in zip(axes[0], cases, strict=True):
            panel.set_title(TITLES[case])
            for each in found:
                if each.case == case:
                    row = len(names) - 1 - names.index(each.contender)
                    _bar(panel, row, 100 * each.share)
            panel.grid(visible=False, axis="y")
            # Room for the figure beside a bar.
            panel.set_xlim(0, 1.25 * max(1.0, *(100 * each.share for each in found)))
        axes[0][0].set_yticks(range(len(names)), list(reversed(names)))
        label_axes(axes, "time spent waiting (%)", None)
        save(figure, path)


def _bar(axes: Axes, row: int, share: float) -> None:
    axes.barh(row, share, height=0.6, color="black")
    axes.annotate(
        f"{share:.0f}",
        (share, row),
        (3, 0),
        textcoords="offset points",
        fontsize=FONT_SIZE - 1.5,
        verticalalignment="center",
    )
