"""A recipe seen from outside: what a run with some command line is called and depends on."""

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.algorithms import build_state
from common.errors import RecipeError
from common.options import read_command_line
from common.tracking import RunIdentity
from comparison.grid import Cell, Grid

__all__ = ["PlannedRun", "plan_runs"]


# A run is the same as itself alone: so it can be a key.
@dataclass(frozen=True, eq=False)
class PlannedRun:
    """One run of a grid.

    Attributes:
        cell: where it belongs.
        seed: which of the cell's runs it is.
        arguments: the recipe's command line.
        identity: name, group and tags in W&B.
        config: what W&B will hold as its configuration, versions left out.
    """

    cell: Cell
    seed: int
    arguments: tuple[str, ...]
    identity: RunIdentity
    config: dict[str, Any]


def plan_runs(
    recipe: Path, grid: Grid, *, group: str, tags: Sequence[str], folder: Path
) -> list[PlannedRun]:
    """The runs of ``grid``, every option checked by the recipe itself before anything starts.

    A recipe has a dataclass ``Config`` of its options, with ``method`` among them, whose
    ``flat(workers)`` is the run's configuration in W&B and whose ``identity(workers)`` names it.

    Raises:
        RecipeError: an option has a value that the recipe or an algorithm refuses.
    """
    module = _load(recipe)
    common = ["--group", group, "--output-dir", str(folder), *grid.options]
    if tags:
        common += ["--tags", *tags]
    planned = []
    for cell, seed in grid.runs():
        arguments = (*cell.arguments(seed), *common)
        config = read_command_line(module.Config, module.__doc__ or "", arguments)
        build_state(config.method)
        # As it comes back from W&B: a tuple is a list there.
        flat = json.loads(json.dumps(config.flat(grid.workers), default=str))
        del flat["versions"]
        identity = config.identity(grid.workers)
        planned.append(PlannedRun(cell, seed, arguments, identity, flat))
    return planned


def _load(recipe: Path) -> Any:
    if not recipe.is_file():
        raise RecipeError(f"{recipe} is no file")
    sys.path.insert(0, str(recipe.resolve().parent))
    try:
        module = importlib.import_module(recipe.stem)
    finally:
        sys.path.pop(0)
    if not hasattr(module, "Config"):
        raise RecipeError(f"{recipe} is no recipe that can be compared: it has no Config")
    return module
