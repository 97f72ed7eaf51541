"""Which runs a grid is made of, and what a recipe makes of them."""

from pathlib import Path

import pytest

from common.errors import RecipeError
from common.launch import RECIPES
from comparison.grid import GRIDS, Cell, Grid, Method, parse_method
from comparison.recipe import PlannedRun, plan_runs
from tests.recipes.recorded_runs import GRID

VISION = RECIPES / "vision.py"


def test_an_algorithm_with_hyper_parameters() -> None:
    method = parse_method("overlap-local-sgd:alpha=0.6,beta=0.7")
    assert method == Method("overlap-local-sgd", (("alpha", "0.6"), ("beta", "0.7")))
    assert method.label == "overlap-local-sgd alpha=0.6 beta=0.7"
    assert method.arguments() == [
        *("--algorithm", "overlap-local-sgd", "--alpha", "0.6", "--beta", "0.7")
    ]


def test_a_method_may_have_a_name() -> None:
    method = parse_method("late=diloco:delay=tau/2,merge=carry")
    assert method.label == "late"
    assert method.spelled == "diloco delay=tau/2 merge=carry"
    assert method.arguments() == ["--algorithm", "diloco", "--delay", "tau/2", "--merge", "carry"]
    assert parse_method("late=ddp") == Method("ddp", (), "late")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("=easgd", "write a name as late=easgd"),
        ("late=sgd", "'sgd' is no algorithm"),
        ("sgd", "'sgd' is no algorithm; there are ddp,"),
        ("easgd:", "write hyper-parameters as easgd:alpha"),
        ("easgd:alpha", "write hyper-parameters as"),
        ("easgd:alpha=", "write hyper-parameters as"),
        ("easgd:tau=8", "use --tau"),
        ("easgd:lr=0.1", "use --lr"),
    ],
)
def test_an_algorithm_that_cannot_be_read(text: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        parse_method(text)


def test_every_cell_is_there_once() -> None:
    grid = GRID.with_changes(
        algorithms=("ddp", "local-sgd", "local-sgd"),
        tau=(2, 8),
        partitions=("iid", "major-class"),
        seeds=(0, 1),
    )
    ddp, local = Method("ddp"), Method("local-sgd")
    # Plain DDP has no tau, so it runs once for all of them.
    assert grid.cells() == [
        Cell(ddp, None, "iid"),
        Cell(local, 2, "iid"),
        Cell(local, 8, "iid"),
        Cell(ddp, None, "major-class"),
        Cell(local, 2, "major-class"),
        Cell(local, 8, "major-class"),
    ]
    # The first seed of everything comes before the second of anything.
    assert grid.runs() == [(cell, seed) for seed in (0, 1) for cell in grid.cells()]


def test_a_learning_rate_is_an_axis_of_every_algorithm(tmp_path: Path) -> None:
    grid = GRID.with_changes(algorithms=("ddp", "easgd"), seeds=(0,), lr=(0.05, 0.15))
    ddp, easgd = Method("ddp"), Method("easgd")
    assert grid.cells() == [
        Cell(ddp, None, "iid", 0.05),
        Cell(ddp, None, "iid", 0.15),
        Cell(easgd, 8, "iid", 0.05),
        Cell(easgd, 8, "iid", 0.15),
    ]
    planned = plan(grid, tmp_path)
    assert [run.config["lr"] for run in planned] == [0.05, 0.15, 0.05, 0.15]
    assert planned[-1].cell.label == "easgd tau=8 lr=0.15 iid"
    assert planned[-1].identity.name == "easgd t8 lr0.15 s0 iid 2w"


@pytest.mark.parametrize("axis", ["algorithms", "tau", "partitions", "seeds"])
def test_an_empty_axis_is_refused(axis: str) -> None:
    with pytest.raises(RecipeError, match="at least one"):
        GRID.with_changes(**{axis: ()}).cells()


def test_changes_leave_out_what_is_none() -> None:
    assert GRID.with_changes(tau=None, seeds=(7,)).tau == GRID.tau
    assert GRID.with_changes(tau=None, seeds=(7,)).seeds == (7,)


def test_the_papers_table() -> None:
    grid = GRIDS["paper-small"]
    # DDP, and six others at four tau, on two partitions, with three seeds.
    assert len(grid.runs()) == (1 + 6 * 4) * 2 * 3
    assert grid.workers == 4


@pytest.mark.parametrize("name", GRIDS)
def test_the_recipe_takes_every_named_grid(name: str, tmp_path: Path) -> None:
    recipe = VISION if "--model" in GRIDS[name].options else RECIPES / "language.py"
    planned = plan(GRIDS[name], tmp_path, recipe)
    assert len({run.identity.name for run in planned}) == len(planned)


def test_a_run_is_what_its_command_line_says(tmp_path: Path) -> None:
    grid = GRID.with_changes(algorithms=("bmuf:eta=0.5",), tau=(4,), seeds=(3,))
    (run,) = plan(grid.with_changes(options=(*grid.options, "--epochs", "7")), tmp_path)
    expected = {
        "algorithm": "bmuf",
        "eta": 0.5,
        "tau": 4,
        "seed": 3,
        "partition": "iid",
        # The last of two that say the same thing counts.
        "model": "small-cnn",
        "epochs": 7,
        "workers": 2,
    }
    assert expected.items() <= run.config.items()
    assert "versions" not in run.config
    assert run.identity.group == "a group"
    assert "a-tag" in run.identity.tags


@pytest.mark.parametrize(
    ("algorithm", "reason"),
    [("cocod-sgd:beta=0.7", "--beta: not an option of cocod-sgd"), ("easgd:alpha=7", "alpha")],
)
def test_a_hyper_parameter_is_refused_before_anything_runs(
    algorithm: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        plan(GRID.with_changes(algorithms=(algorithm,)), tmp_path)


def test_what_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is no file"):
        plan_runs(tmp_path / "none.py", GRID, group="", tags=(), folder=tmp_path)
    script = tmp_path / "not_a_recipe.py"
    script.write_text("")
    with pytest.raises(RecipeError, match="has no Config"):
        plan_runs(script, GRID, group="", tags=(), folder=tmp_path)


def test_a_delay_follows_tau(tmp_path: Path) -> None:
    """What the command line says is the same at every tau; what the run has, and W&B, is not."""
    grid = GRID.with_changes(algorithms=("diloco:delay=tau/2",), tau=(2, 8), seeds=(0,))
    assert [run.config["delay"] for run in plan(grid, tmp_path)] == [1, 4]


def plan(grid: Grid, folder: Path, recipe: Path = VISION) -> list[PlannedRun]:
    return plan_runs(recipe, grid, group="a group", tags=("a-tag",), folder=folder)
