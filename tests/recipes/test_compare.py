"""recipes/compare.py through its command line: a tiny grid, from nothing to pictures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.launch import RECIPES
from comparison.recorded import read_runs
from tests.recipes.runs import OVERLAP, Run

pytestmark = pytest.mark.slow

# The second is the run that other tests look at as well, launched by itself.
ALGORITHMS = ("ddp", "overlap-local-sgd:beta=0.5")
PICTURES = {"loss-steps", "loss-seconds", "accuracy-megabytes", "exposed"}


def compare(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPES / "compare.py"), "--output-dir", str(folder), *words]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=110, check=False
    )


def tiny_grid(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    axes = ("--algorithms", *ALGORITHMS, "--tau", "4", "--seeds", "0")
    return compare(folder, *axes, *words, "--", *OVERLAP[:2], "--log-every", "1")


@pytest.mark.timeout(240)
def test_a_tiny_grid(overlap_run: Run, tmp_path: Path) -> None:
    done = tiny_grid(tmp_path, "--docs", str(tmp_path / "docs"))
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
    again = tiny_grid(tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "short: 2 runs, 2 of them complete" in again.stdout
    assert "finished in" not in again.stdout
    assert (folder / "comparison.md").exists()
    assert len(read_runs(folder)) == 2
    assert {r["name"] for r in map(json.loads, (folder / "events.jsonl").open())} == {
        "ddp iid seed=0",
        "overlap-local-sgd beta=0.5 tau=4 iid seed=0",
    }


def test_nothing_to_show_yet(tmp_path: Path) -> None:
    done = compare(tmp_path, "--no-run")
    assert done.returncode == 1
    assert "short: 12 runs, 0 of them complete" in done.stdout
    assert "no complete run" in done.stdout


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--grid", "huge"], "'huge' is no grid; there are short, paper-small"),
        (["--algorithms", "easgd:alpha=7"], "alpha"),
        (["--algorithms", "cocod-sgd:beta=0.5"], "--beta: not an option of cocod-sgd"),
    ],
)
def test_a_refusal_is_one_line(words: list[str], reason: str, tmp_path: Path) -> None:
    done = compare(tmp_path, *words)
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 1
    assert reason in done.stdout
    assert "Traceback" not in done.stderr
