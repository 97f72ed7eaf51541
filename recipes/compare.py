"""Run algorithms side by side over a grid of settings and seeds, and show what came of it.

    python recipes/compare.py --algorithms local-sgd overlap-local-sgd:beta=0.7 --tau 2 8

Every run is a W&B run, offline, all of one group. A run that is complete is not run again, so that
a comparison goes on where it was interrupted, and grows when seeds or algorithms are added. Makes
tables, and pictures of loss, accuracy and communication. What follows a -- goes to the recipe.
"""

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from commhooks import CommHooksError
from common.errors import RecipeError
from common.launch import RECIPES, LaunchError
from common.options import require
from common.partitions import Scheme
from comparison.grid import GRIDS, Grid
from comparison.pictures import draw_all
from comparison.recipe import PlannedRun, plan_runs
from comparison.recorded import RecordedRun, matching, read_runs
from comparison.results import CellResult, best_rates
from comparison.running import run_all
from comparison.tables import markdown, terminal_tables


def _of_grid(metavar: str) -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="(default: the grid's)")


@dataclass(frozen=True)
class Compare:
    """What is compared, and where."""

    grid: Annotated[str, tyro.conf.arg(metavar="|".join(GRIDS))] = "short"
    """Where to start from; the next six options change it."""
    algorithms: Annotated[tuple[str, ...] | None, _of_grid("NAME[:OPTION=VALUE,...] [...]")] = None
    """Algorithms with hyper-parameters: ddp overlap-local-sgd:alpha=0.6,beta=0.7. One may be given
    a name for tables and pictures: late=diloco:delay=tau"""
    tau: Annotated[tuple[int, ...] | None, _of_grid("STEPS [STEPS ...]")] = None
    """Steps between two averagings."""
    lr: Annotated[tuple[float, ...] | None, _of_grid("RATE [RATE ...]")] = None
    """Learning rates; a grid without any leaves it to the recipe."""
    partitions: Annotated[tuple[Scheme, ...] | None, _of_grid("NAME [NAME ...]")] = None
    """iid, dirichlet, major-class."""
    seeds: Annotated[tuple[int, ...] | None, _of_grid("SEED [SEED ...]")] = None
    """Tables show mean and spread over them."""
    workers: Annotated[int | None, _of_grid("INT")] = None
    """Processes that train together."""
    recipe: Path = RECIPES / "vision.py"
    """What is run."""
    link: Annotated[str | None, tyro.conf.arg(metavar="RATE", help_behavior_hint="")] = None
    """Run on a network on which each worker sends so much, as recipes/link.py makes it: 200mbit."""
    run: bool = True
    """--no-run shows what has been run so far."""
    docs: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder to write the tables to as Markdown, and the pictures."""
    output_dir: Path = Path("runs/compare")
    """Every grid, recipe and link has a folder of its own in this one."""

    def __post_init__(self) -> None:
        require(self, "workers", 2)

    @property
    def name(self) -> str:
        """What the folder and the W&B group are called."""
        recipe = [] if self.recipe.stem == "vision" else [self.recipe.stem]
        return "-".join([*recipe, self.grid, *([self.link] if self.link else [])])

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return self.output_dir / self.name

    def full_grid(self, options: Sequence[str]) -> Grid:
        """The grid with all changes."""
        if self.grid not in GRIDS:
            raise RecipeError(f"{self.grid!r} is no grid; there are {', '.join(GRIDS)}")
        grid = GRIDS[self.grid].with_changes(
            algorithms=self.algorithms,
            tau=self.tau,
            lr=self.lr,
            partitions=self.partitions,
            seeds=self.seeds,
            workers=self.workers,
        )
        return grid.with_changes(options=(*grid.options, *options))


def gather(
    planned: Sequence[PlannedRun], recorded: Sequence[RecordedRun], tags: Sequence[str]
) -> dict[PlannedRun, RecordedRun]:
    """The planned runs that are complete, and what W&B has of them."""
    found = {run: matching(recorded, run.config, tags) for run in planned}
    return {run: record for run, record in found.items() if record is not None}


def bring_about(
    compare: Compare, grid: Grid, tags: Sequence[str], console: Console
) -> tuple[dict[PlannedRun, RecordedRun], list[str]]:
    """Run what is missing of a grid; what is complete then, and the names of what failed."""
    planned = plan_runs(
        compare.recipe, grid, group=f"compare {compare.name}", tags=tags, folder=compare.folder
    )
    complete = gather(planned, read_runs(compare.folder), tags)
    console.print(f"{compare.name}: {len(planned)} runs, {len(complete)} of them complete")
    failed: list[str] = []
    if len(complete) < len(planned) and compare.run:
        failed = run_all(
            planned,
            list(complete),
            recipe=compare.recipe,
            workers=grid.workers,
            link=compare.link,
            folder=compare.folder,
            console=console,
        )
        complete = gather(planned, read_runs(compare.folder), tags)
    return complete, failed


def by_cell(grid: Grid, complete: Mapping[PlannedRun, RecordedRun]) -> list[CellResult]:
    """The runs of every cell, in the grid's order."""
    runs: dict[Any, list[RecordedRun]] = {}
    for run, record in complete.items():
        runs.setdefault(run.cell, []).append(record)
    return [CellResult(cell, tuple(runs[cell])) for cell in grid.cells() if cell in runs]


def report(
    compare: Compare,
    grid: Grid,
    complete: dict[PlannedRun, RecordedRun],
    console: Console,
) -> None:
    """Tables and pictures of what there is."""
    results = by_cell(grid, complete)
    console.print()
    for table in terminal_tables(results, f"{compare.name}, {grid.workers} workers"):
        console.print(table)
    pictures = draw_all(results, compare.folder)
    command = shlex.join(["python", "recipes/compare.py", *sys.argv[1:]])
    link = f"Links of {compare.link}." if compare.link else "No link is shaped."
    details = f"{grid.workers} workers, options `{shlex.join(grid.options)}`. {link}"
    names = [f"{m.name} is {m.spelled}" for m in grid.methods() if m.name is not None]
    if names:
        console.print("; ".join(names), markup=False)
        details += f" {'; '.join(names)}."
    (compare.folder / "comparison.md").write_text(
        markdown(results, command=command, details=details)
    )
    if compare.docs is not None:
        compare.docs.mkdir(parents=True, exist_ok=True)
        shutil.copy(compare.folder / "comparison.md", compare.docs / "tables.inc")
        for picture in pictures:
            shutil.copy(picture, compare.docs)
    wandb = Path(sys.executable).with_name("wandb")
    console.print(f"comparison.md and pictures lie in {compare.folder}; the runs side by side:")
    console.print(f"  {_short(wandb)} leet {compare.folder / 'wandb'}", soft_wrap=True)


def main(arguments: Sequence[str]) -> int:
    """Run what is missing, then show everything; the status says whether anything failed."""
    own, options = list(arguments), list[str]()
    if "--" in own:
        split = own.index("--")
        own, options = own[:split], own[split + 1 :]
    compare = tyro.cli(Compare, description=__doc__, args=own)
    console = Console(highlight=False)
    # Narrower, and the tables would drop their figures.
    console.width = max(console.width, 120)
    tags = [f"link={compare.link}" if compare.link else "link=none"]
    failed: list[str] = []
    try:
        grid = compare.full_grid(options)
        if grid.tuning:
            console.print("first the learning rates, with seeds of their own")
            tried, failed = bring_about(compare, replace(grid, seeds=grid.tuning), tags, console)
            grid = replace(grid, only=best_rates(by_cell(grid, tried)))
        complete, missing = bring_about(compare, grid, tags, console)
        failed += missing
    except (RecipeError, CommHooksError, LaunchError) as error:
        console.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; all processes have ended, and the same command goes on")
        return 130
    if not complete:
        console.print("there is no complete run to show")
        return 1
    report(compare, grid, complete, console)
    if failed:
        console.print(f"failed: {', '.join(failed)}", style="bold red", markup=False)
    return 1 if failed else 0


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
