"""Runs of a recipe through its command line, small enough for a test."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.launch import RECIPES, launch
from common.report import Results, read_results
from tests.harness import scaled
from tests.harness.script import run_script

# On an idle machine, where ten seconds are enough.
TIMEOUT = 90.0
# The run that several tests look at.
OVERLAP = ("--epochs", "2", "--tau", "4", "--beta", "0.5")


@dataclass(frozen=True)
class Run:
    """What a run left."""

    results: Results
    printed: str
    folder: Path


def train(
    folder: Path,
    algorithm: str,
    *arguments: str,
    workers: int = 2,
    script: Path = RECIPES / "vision.py",
    model: Sequence[str] = ("--model", "small-cnn"),
    launcher: bool = False,
) -> Run:
    """Train a small model with ``algorithm``; without W&B unless ``arguments`` say otherwise.

    In forks that have imported everything, which takes a tenth of the time of a real
    ``accelerate launch``; with ``launcher``, through that.
    """
    report = folder / "results.json"
    words = [
        *("--algorithm", algorithm, *model, "--wandb", "disabled"),
        *("--output-dir", str(folder), "--json", str(report)),
        *arguments,
    ]
    if launcher:
        limit = scaled(TIMEOUT)
        printed = launch(script, words, workers=workers, capture=True, timeout=limit, cwd=folder)
    else:
        printed = run_script(script, words, workers, folder=folder, timeout=TIMEOUT)
    return Run(read_results(report), printed, folder)


def records(run: Run) -> list[dict[str, Any]]:
    """All records of the run's W&B file, read the way its users are told to."""
    assert run.results.wandb_dir is not None
    lines = _leet("--json", run).splitlines()
    return [json.loads(line) for line in lines]


def summary(run: Run) -> dict[str, Any]:
    """The state, configuration and last values of the run's W&B file."""
    found: dict[str, Any] = json.loads(_leet("--summary", run, "--json"))
    return found


def _leet(first: str, run: Run, *others: str) -> str:
    wandb = Path(sys.executable).with_name("wandb")
    command = [str(wandb), "leet", "inspect", first, *others, str(run.results.wandb_dir)]
    return subprocess.run(
        command, cwd=run.folder, check=True, capture_output=True, text=True, timeout=scaled(30)
    ).stdout
