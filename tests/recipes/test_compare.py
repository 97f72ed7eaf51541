"""recipes/compare.py through its command line: a tiny grid, from nothing to pictures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.launch import RECIPES
from comparison.recorded import read_runs
from tests.harness import scaled
from tests.harness.script import ScriptFailed, run_script
from tests.recipes.runs import OVERLAP, Run

pytestmark = pytest.mark.slow

# The second is the run that other tests look at as well, launched by itself.
ALGORITHMS = ("ddp", "overlap-local-sgd:beta=0.5")
PICTURES = {"loss-steps", "loss-seconds", "loss-megabytes", "accuracy-megabytes", "exposed"}


TINY_GRID = ("--algorithms", *ALGORITHMS, "--tau", "4", "--seeds", "0")
TINY_RUNS = ("--", *OVERLAP[:2], "--log-every", "1")


def compare(folder: Path, *words: str) -> str:
    """What it printed; in a fork, which need not import everything."""
    words = ("--output-dir", str(folder), *words)
    return run_script(RECIPES / "compare.py", words, 1, folder=folder, timeout=60)


@pytest.mark.timeout(240)
def test_a_tiny_grid(overlap_run: Run, tmp_path: Path) -> None:
    options = ("--output-dir", str(tmp_path), "--docs", str(tmp_path / "docs"))
    done = subprocess.run(
        [sys.executable, str(RECIPES / "compare.py"), *TINY_GRID, *options, *TINY_RUNS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=scaled(110),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "short"
    assert "short: 2 runs, 0 of them complete" in done.stdout
    assert "[2/2] overlap-local-sgd beta=0.5 tau=4 iid seed=0: finished in" in done.stdout
    runs = read_runs(folder)
    assert len(runs) == 2
    assert all(run.complete for run in runs)
    # Not the first run of its launch, and yet what it is when launched alone.
    overlap = next(run for run in runs if run.config["algorithm"] == "overlap-local-sgd")
    alone = overlap_run.results
    assert overlap.summary["final/loss"] == pytest.approx(alone.loss, abs=0)
    assert overlap.summary["final/train_loss"] == pytest.approx(alone.train_loss, abs=0)
    assert overlap.name == alone.name
    page = (folder / "comparison.md").read_text()
    assert alone.accuracy is not None
    assert f"| overlap-local-sgd beta=0.5 | 4 | {100 * alone.accuracy:.1f} |" in page
    for place in (folder, tmp_path / "docs"):
        assert {path.stem for path in place.glob("*.png")} == PICTURES
    assert (tmp_path / "docs" / "tables.inc").read_text() == page

    # Once more: nothing is left to run, and nothing is.
    (folder / "comparison.md").unlink()
    again = compare(tmp_path, *TINY_GRID, *TINY_RUNS)
    assert "short: 2 runs, 2 of them complete" in again
    assert "finished in" not in again
    assert (folder / "comparison.md").exists()
    assert len(read_runs(folder)) == 2
    assert {r["name"] for r in map(json.loads, (folder / "events.jsonl").open())} == {
        "ddp iid seed=0",
        "overlap-local-sgd beta=0.5 tau=4 iid seed=0",
    }


def test_nothing_to_show_yet(tmp_path: Path) -> None:
    with pytest.raises(ScriptFailed, match="status 1") as failure:
        compare(tmp_path, "--no-run")
    assert "short: 12 runs, 0 of them complete" in failure.value.printed
    assert "no complete run" in failure.value.printed


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--grid", "huge"], "'huge' is no grid; there are short, paper-small"),
        (["--algorithms", "easgd:alpha=7"], "alpha"),
        (["--algorithms", "cocod-sgd:beta=0.5"], "--beta: not an option of cocod-sgd"),
    ],
)
def test_a_refusal_is_one_line(words: list[str], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ScriptFailed, match="status 2") as failure:
        compare(tmp_path, *words)
    assert len(failure.value.printed.splitlines()) == 1
    assert reason in failure.value.printed
