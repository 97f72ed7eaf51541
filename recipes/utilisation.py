"""What share of its time a worker computes, against the bandwidth of its link.

    python recipes/utilisation.py --docs docs/utilisation

Measures DDP, torch's post-local SGD, torchft's delayed DiLoCo (where it is installed) and
OverlapLocalSGD, in fp32, int8 and int4, over links of a chosen speed on this one machine. The steps
are those of a pretend accelerator, of which only the ratio of a step's time to the model's size
matters: by default both are 0.15 of what the benchmark has. What has been measured is not measured
again, so that a run goes on where it was interrupted. All of it takes about 25 minutes.
"""

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from benchmark.contenders import TORCHFT_DELAYED, skipped
from benchmark.measurer import Measurer
from benchmark.utilisation import CONTENDERS, Point, Points, Setting, gaps, measure, table
from benchmark.utilisation_picture import draw_utilisation
from common.entry import enter
from common.markdown import machine
from network import sandbox

_UNITS = {"kbit": 1e-3, "mbit": 1.0, "gbit": 1e3}


@dataclass(frozen=True)
class Utilisation:
    """Which points of the curve are measured."""

    rates: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RATE [RATE ...]")] = (
        "1gbit",
        "400mbit",
        "200mbit",
        "100mbit",
        "50mbit",
        "25mbit",
        "12.5mbit",
    )
    """What each worker can send."""
    tau: Annotated[tuple[int, ...], tyro.conf.arg(metavar="STEPS [STEPS ...]")] = (1, 8, 32, 128)
    """Steps between two averagings."""
    ranks: int = 2
    """Workers."""
    step_ms: float = 45.0
    """Time of a step on the pretend accelerator."""
    size: float = 0.15
    """Its parameters, in units of 11 million."""
    repeats: int = 1
    """How often everybody has a turn at each point."""
    docs: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder to write the table to as Markdown, the measurements as JSON, and the picture."""
    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """A few points with short steps, to see whether it works; the figures mean little."""
    output_dir: Path = Path("runs/utilisation")
    """Where measurements, table and picture go."""

    @property
    def setting(self) -> Setting:
        """What is the same for all points."""
        return Setting(self.ranks, self.step_ms, self.size, self.repeats)


def megabits(rate: str) -> float:
    """``12.5mbit`` in Mbit/s.

    Raises:
        ValueError: it is no such rate.
    """
    found = re.fullmatch(r"([\d.]+)(kbit|mbit|gbit)", rate)
    if found is None:
        raise ValueError(f"{rate!r} is no rate to draw a point at; write 12.5mbit or 1gbit")
    return float(found[1]) * _UNITS[found[2]]


def measure_all(
    plan: Utilisation, contenders: Sequence[str], points: Points, console: Console
) -> None:
    """Measure what is missing, and keep each point as soon as it is known."""
    measurer = Measurer(plan.output_dir, shaped=True)
    for gap in gaps(plan.rates, plan.tau, contenders, points.of(plan.setting)):
        found = measure(gap, plan.setting, measurer)
        points.add(found)
        tau = "" if gap.tau is None else f", tau={gap.tau}"
        figures = ", ".join(f"{point.contender} {point.utilisation:.1%}" for point in found)
        console.print(f"{gap.rate}{tau}: {figures}", soft_wrap=True)


def page(plan: Utilisation, points: Sequence[Point], command: str) -> str:
    """The table as a part of the documentation."""
    parameters = points[0].parameters // 4
    rates = {rate: f"{megabits(rate):g}" for rate in plan.rates}
    details = (
        f"Printed by `{command}` on {machine()}. {plan.ranks} workers, {parameters / 1e6:.2f} M "
        f"parameters, steps of {plan.step_ms:g} ms. Percent of the time that workers spend "
        "computing, against what each can send in Mbit/s; DDP has no tau."
    )
    if all(point.contender != TORCHFT_DELAYED for point in points):
        details += " torchft was not installed."
    return f"{details}\n\n{table(points, plan.rates, plan.tau, rates)}\n"


def report(plan: Utilisation, points: Points) -> None:
    """Table and picture of what there is."""
    places = {(rate, tau) for rate in plan.rates for tau in (None, *plan.tau)}
    shown = [point for point in points.of(plan.setting) if (point.rate, point.tau) in places]
    command = shlex.join(["python", "recipes/utilisation.py", *sys.argv[1:]])
    (plan.output_dir / "tables.inc").write_text(page(plan, shown, command))
    rates = {rate: megabits(rate) for rate in plan.rates}
    draw_utilisation(shown, rates, plan.tau, plan.output_dir / "utilisation.png")
    if plan.docs is not None:
        plan.docs.mkdir(parents=True, exist_ok=True)
        for name in ("tables.inc", "utilisation.png", "points.json"):
            shutil.copy(plan.output_dir / name, plan.docs)


def main() -> int:
    """Measure, show, keep."""
    plan = tyro.cli(Utilisation, description=__doc__)
    if plan.quick:
        default = plan.rates == Utilisation().rates
        rates = ("1gbit", "200mbit") if default else plan.rates
        taus = (1, 8) if plan.tau == Utilisation().tau else plan.tau
        plan = replace(plan, rates=rates, tau=taus, step_ms=10.0, size=0.1)
    console = Console(highlight=False)
    refusal = sandbox.refusal()
    if refusal is not None:
        console.print(f"error: links cannot be shaped on this machine ({refusal})", soft_wrap=True)
        return 1
    for name, reason in skipped().items():
        console.print(f"left out: {name}: {reason}", style="dim", soft_wrap=True)
    contenders = [name for name in CONTENDERS if name != TORCHFT_DELAYED or not skipped()]
    started = time.monotonic()
    try:
        for rate in plan.rates:
            megabits(rate)
        points = Points(plan.output_dir / "points.json")
        measure_all(plan, contenders, points, console)
    except ValueError as error:
        console.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        return 2
    except subprocess.CalledProcessError as error:
        console.print(f"[bold red]a measurement failed with status {error.returncode}[/bold red]")
        return 1
    report(plan, points)
    console.print((plan.output_dir / "tables.inc").read_text(), markup=False, soft_wrap=True)
    minutes = (time.monotonic() - started) / 60
    console.print(f"{minutes:.1f} minutes; points.json and picture lie in {plan.output_dir}")
    return 0


if __name__ == "__main__":
    enter(main)
