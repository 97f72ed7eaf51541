"""How much of a step's time communication takes, under every alternative, side by side.

Trains the same model with each of them over links of a chosen speed on this one machine, and shows
step times as multiples of not communicating at all. Then measures what the library itself costs:
a step, a boundary, memory, and draws the profile of two rounds. Takes about half an hour; with
--quick about a minute.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import wandb
from rich.console import Console

from benchmark.bars import bars_table, measured_bars
from benchmark.contenders import skipped
from benchmark.markdown import markdown
from benchmark.measurer import Measurer
from benchmark.picture import draw
from benchmark.results import Cell, Line, lines, medians
from benchmark.tables import boundary_table, overhead_table, race_table, shared_table
from benchmark.timeline import draw_timeline
from common.entry import enter
from network import sandbox


@dataclass(frozen=True)
class Bench:
    """What is measured, and how thoroughly."""

    cells: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CELL [CELL ...]")] = (
        "2x200mbit",
        "2x1gbit",
        "2x50mbit",
        "2x12.5mbit:tau16",
        "2xunshaped",
        "4x200mbit",
        "4x1gbit",
        "4x50mbit",
        "4xunshaped",
        "2x2x200mbit",
        "2x200mbit:resnet18",
    )
    """Networks, as RANKSxRATE or MACHINESxRANKSxRATE; :resnet18 for that load in place of the
    pretend accelerator, :tau16 for another tau."""
    tau: int = 8
    """Steps between two averagings."""
    step_ms: float = 300.0
    """Time of a step on the pretend accelerator."""
    size: float = 1.0
    """Parameters of the pretend accelerator's model, x 11 million; fewer are less work for the
    cores beside it."""
    repeats: int = 1
    """How often every contender has its turn in each cell."""
    only: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]", help_behavior_hint="")
    ] = ()
    """Measure contenders with one of these in their name alone."""
    record: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """File to write the medians to against which commhooks.plan is tested."""
    docs: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder to write the tables to as Markdown, and the picture."""
    micro: bool = True
    """Measure the library's own cost too, and profile it."""
    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """A small form of everything, to see whether it works; its figures mean little."""
    output_dir: Path = Path("runs/bench")
    """Every benchmark makes a folder of its own in this one."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Where W&B keeps the results."""


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    size: float = 1.0
    step_seconds: float = 0.3
    windows: int = 2
    overhead_steps: int = 300
    boundary_blocks: tuple[int, ...] = (20, 226)
    boundary_rounds: int = 7
    traced_tau: int = 4


_CELL = re.compile(r"(\d+)x(?:(\d+)x)?([a-z0-9.]+?)(?::(pretend|resnet18))?(?::tau(\d+))?")


def parse_cells(texts: Sequence[str], *, shaped: bool) -> list[Cell]:
    """The cells; without a shaped network those that then are the same are one."""
    cells = []
    for text in texts:
        found = _CELL.fullmatch(text)
        if found is None:
            raise SystemExit(
                f"error: {text!r} is no cell; write 2x200mbit, 2x2x200mbit, 2x200mbit:resnet18 or "
                "2x200mbit:tau16"
            )
        nodes, each, rate, load, tau = found.groups()
        per_node = int(each or 1)
        rate = rate if shaped else "unshaped"
        tau = int(tau) if tau else None
        cells.append(Cell(int(nodes) * per_node, rate, load or "pretend", per_node, tau))
    return list(dict.fromkeys(cells))


def run_races(
    bench: Bench, scale: Scale, measurer: Measurer, console: Console
) -> dict[Cell, list[Line]]:
    """Every cell's results, shown as they come."""
    results = {}
    for cell in parse_cells(bench.cells, shaped=measurer.shaped):
        console.print(f"measuring {cell.title} ...", style="dim")
        fields = {
            "load": cell.load,
            "step_seconds": scale.step_seconds,
            "size": scale.size,
            "tau": cell.tau or bench.tau,
            "repeats": bench.repeats,
            "windows": scale.windows,
            "counted": measurer.shaped,
            "only": bench.only,
        }
        samples = measurer.measure(cell.ranks, cell.rate, "race", fields, cell.per_node)
        results[cell] = lines(samples, cell.tau or bench.tau)
        console.print(race_table(cell, results[cell], cell.tau or bench.tau))
    return results


def run_micro(scale: Scale, measurer: Measurer, console: Console) -> dict[str, Any]:
    """What the library itself costs."""
    console.print("measuring a step and a boundary ...", style="dim")
    fields: dict[str, Any] = {"steps": scale.overhead_steps}
    overheads = measurer.measure(2, "unshaped", "overheads", fields)
    console.print(overhead_table(overheads))
    boundaries = []
    for blocks in scale.boundary_blocks:
        fields = {"blocks": blocks, "rounds": scale.boundary_rounds}
        boundaries += measurer.measure(2, "unshaped", "boundaries", fields)
    console.print(boundary_table(boundaries))
    # Four ranks keep two states each, for which the larger model would not fit.
    fields = {"blocks": scale.boundary_blocks[0], "rounds": scale.boundary_rounds}
    shared = measurer.measure(4, "unshaped", "shared", fields, per_node=2)
    console.print(shared_table(shared))
    return {"overheads": overheads, "boundaries": boundaries, "shared": shared}


def run_trace(scale: Scale, measurer: Measurer, folder: Path, console: Console) -> None:
    """A profile of two rounds over a slow link: a picture, and the file it is drawn from."""
    console.print("profiling two rounds ...", style="dim")
    fields: dict[str, Any] = {
        "step_seconds": scale.step_seconds,
        "size": scale.size / 2,
        "tau": scale.traced_tau,
        "chrome": str((folder / "trace.json").resolve()),
    }
    rate = "200mbit" if measurer.shaped else "unshaped"
    spans = measurer.measure(2, rate, "trace", fields)
    draw_timeline(spans, folder / "trace.png")


def log_to_wandb(
    bench: Bench,
    results: Mapping[Cell, Sequence[Line]],
    micro: Mapping[str, Sequence[Mapping[str, Any]]],
    folder: Path,
) -> None:
    """The same to W&B: the tables, the pictures, and every multiple in the summary."""
    run = wandb.init(
        project="commhooks",
        name=f"bench {folder.name}",
        group="bench",
        job_type="benchmark",
        tags=["bench", *(["quick"] if bench.quick else [])],
        config={**asdict(bench), "output_dir": None, "record": None, "docs": None},
        dir=str(folder),
        mode=bench.wandb,
        settings=wandb.Settings(quiet=True, silent=bench.wandb != "online"),
    )
    columns: list[str | int] = [
        "cell",
        "contender",
        "kind",
        "multiple",
        "min",
        "max",
        "exposed",
        "hidden",
        "sent_per_step",
        "peak_sent",
        "peak",
    ]
    table = wandb.Table(columns=columns)
    for cell, found in results.items():
        for line in found:
            sent = [line.sent_per_step, line.peak_sent]
            measured = [line.exposed, line.hidden, *sent, line.peak]
            numbers = [*line.multiple, *measured]
            table.add_data(cell.title, line.contender, line.kind, *numbers)
            run.summary[f"multiple/{cell.title}/{line.contender}"] = line.multiple[0]
    record: dict[str, Any] = {"results": table}
    for name, rows in micro.items():
        heads: list[str | int] = list(rows[0])
        values = [[str(v) if isinstance(v, tuple | list) else v for v in r.values()] for r in rows]
        record[name] = wandb.Table(columns=heads, data=values)
    for picture in folder.glob("*.png"):
        record[picture.stem] = wandb.Image(str(picture))
    run.log(record)
    run.finish()


def main() -> int:
    """Measure, show, keep."""
    bench = tyro.cli(Bench, description=__doc__)
    console = Console(highlight=False)
    # Narrower, and the tables would drop their figures.
    console.width = max(console.width, 112)
    scale = Scale(bench.size, bench.step_ms / 1e3)
    if bench.quick:
        # As few parameters as there are fragments.
        scale = Scale(0.1, 0.01, 1, 20, (2,), 2)
        default = bench.cells == Bench().cells
        cells = ("2x200mbit", "4xunshaped", "2x2x200mbit") if default else bench.cells
        bench = Bench(**{**vars(bench), "cells": cells, "tau": min(bench.tau, 4)})
    refusal = sandbox.refusal()
    if refusal is not None:
        console.print(f"No shaped network on this machine ({refusal}): all links are unshaped.")
    for name, reason in skipped().items():
        console.print(f"left out: {name}: {reason}", style="dim", soft_wrap=True)
    folder = bench.output_dir / time.strftime("%Y%m%d-%H%M%S")
    measurer = Measurer(folder, shaped=refusal is None)
    started = time.monotonic()
    try:
        results = run_races(bench, scale, measurer, console)
        micro = run_micro(scale, measurer, console) if bench.micro else {}
        if bench.micro:
            run_trace(scale, measurer, folder, console)
    except subprocess.CalledProcessError as error:
        console.print(f"[bold red]a measurement failed with status {error.returncode}[/bold red]")
        return 1
    bars = measured_bars(results, micro)
    if bars:
        console.print(bars_table(bars))
    if bench.record is not None:
        bench.record.write_text(json.dumps(medians(results, bench.tau), indent=1) + "\n")
    draw(results, bench.tau, folder / "bench.png")
    if bench.docs is not None:
        bench.docs.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["python", "recipes/bench.py", *sys.argv[1:]])
        page = markdown(results, micro, bars, command=command, tau=bench.tau)
        (bench.docs / "tables.inc").write_text(page)
        for picture in folder.glob("*.png"):
            shutil.copy(picture, bench.docs)
    if bench.wandb != "disabled":
        log_to_wandb(bench, results, micro, folder)
    minutes = (time.monotonic() - started) / 60
    console.print(f"{minutes:.1f} minutes; records, picture and W&B run lie in {folder}")
    return 0


if __name__ == "__main__":
    enter(main)
