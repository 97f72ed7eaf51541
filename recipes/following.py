"""Shows how tau="auto" follows a link that changes its rate in the middle of a run.

    python recipes/following.py --docs docs/periods

Two workers train on a pretend accelerator with Overlap-Local-SGD, while their link goes from 200 to
50 Mbit/s and on to 1 Gbit/s; then once more with the tau that 200 Mbit/s need. Prints for each
stretch which tau was reached, after how many rounds, and which part of the time was waited. Takes
about six minutes.
"""

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.axes import Axes

from benchmark.following import StepRecord
from benchmark.measurer import Measurer
from common.entry import enter
from common.markdown import machine, markdown_table
from comparison.panels import canvas, label_axes, save
from network import sandbox
from network.rates import parse_rates


@dataclass(frozen=True)
class Following:
    """The link, and what trains over it."""

    rate: str = "200mbit,50mbit@60,1gbit@120"
    """What each worker can send, and when that changes."""
    seconds: float = 165.0
    """How long a run takes."""
    step_ms: float = 45.0
    """Time of a step on the pretend accelerator."""
    size: float = 0.15
    """Its parameters, in units of 11 million."""
    fixed: int = 8
    """The tau of the run that does not follow."""
    docs: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder to write the table to as Markdown, and the picture."""
    output_dir: Path = Path("runs/following")
    """Where measurements, table and picture go."""


def stretches(plan: Following) -> list[tuple[str, float, float]]:
    """Each rate, from when to when."""
    first, changes = parse_rates(plan.rate)
    rates = [first, *(change.rate for change in changes)]
    edges = [0.0, *(change.seconds for change in changes), plan.seconds]
    return list(zip(rates, edges[:-1], edges[1:], strict=True))


def rows(plan: Following, name: str, records: Sequence[StepRecord]) -> list[list[str]]:
    """What a run did on each stretch, and in all."""
    found = []
    for rate, begin, end in stretches(plan):
        inside = [record for record in records if begin <= record.seconds < end]
        last = inside[-1]
        # The rounds from the change until tau was near what it was at the end.
        settled = next(r for r in inside if abs(r.tau - last.tau) <= last.tau / 5)
        waited = (last.exposed - inside[0].exposed) / (last.seconds - inside[0].seconds)
        found.append(
            [name, rate, str(last.tau), str(settled.rounds - inside[0].rounds), f"{waited:.1%}"]
        )
    first, last = records[0], records[-1]
    waited = (last.exposed - first.exposed) / (last.seconds - first.seconds)
    return [*found, [name, "all of it", "", "", f"{waited:.1%}"]]


def draw(plan: Following, runs: dict[str, Sequence[StepRecord]], path: Path) -> None:
    """Tau of both runs against time."""
    with canvas(1, 1, height=2.0, legend_rows=0) as (figure, axes):
        panel = axes[0][0]
        looks = {
            "auto": {"color": "#0072B2", "linestyle": "-"},
            "fixed": {"color": "#E69F00", "linestyle": "--"},
        }
        for name, records in runs.items():
            style: dict[str, Any] = {**looks[name], "linewidth": 1.1, "label": name}
            panel.plot(
                [record.seconds for record in records], [record.tau for record in records], **style
            )
        panel.set_yscale("log", base=2)
        panel.set_ylim(1, 2 * max(record.tau for records in runs.values() for record in records))
        panel.legend(loc="lower left")
        _edges(panel, plan)
        label_axes(axes, "seconds", "tau")
        save(figure, path)


def _edges(panel: Axes, plan: Following) -> None:
    for rate, begin, _ in stretches(plan):
        panel.axvline(begin, color="#999999", linewidth=0.6, linestyle=":")
        panel.annotate(
            rate,
            (begin, 1.0),
            (2, -8),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=6,
            color="#555555",
        )


def main() -> int:
    """Run both, show, keep."""
    plan = tyro.cli(Following, description=__doc__)
    refusal = sandbox.refusal()
    if refusal is not None:
        print(f"error: links cannot be shaped on this machine ({refusal})", file=sys.stderr)
        return 1
    measurer = Measurer(plan.output_dir, shaped=True)
    runs: dict[str, Sequence[StepRecord]] = {}
    for name, tau in (("auto", "auto"), ("fixed", plan.fixed)):
        fields = {
            "seconds": plan.seconds,
            "step_seconds": plan.step_ms / 1e3,
            "size": plan.size,
            "tau": tau,
        }
        records = measurer.measure(2, plan.rate, "following", fields)
        runs[name] = [StepRecord(**record) for record in records]
    table = markdown_table(
        ["tau", "link", "tau at its end", "rounds to within a fifth of it", "waited"],
        [row for name, records in runs.items() for row in rows(plan, name, records)],
    )
    command = shlex.join(["python", "recipes/following.py", *sys.argv[1:]])
    text = (
        f"Printed by `{command}` on {machine()}. 2 workers, steps of {plan.step_ms:g} ms, "
        f"{plan.size * 10.97:.2f} M parameters.\n\n{table}\n"
    )
    (plan.output_dir / "tables.inc").write_text(text)
    draw(plan, runs, plan.output_dir / "following.png")
    print(text)
    if plan.docs is not None:
        plan.docs.mkdir(parents=True, exist_ok=True)
        for name in ("tables.inc", "following.png"):
            shutil.copy(plan.output_dir / name, plan.docs)
    return 0


if __name__ == "__main__":
    enter(main)
