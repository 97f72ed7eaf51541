"""Runs read back from their offline W&B files, and which of them count as complete."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from comparison.recorded import RecordedRun, matching, read_run, read_runs
from tests.harness import scaled

# What a recipe does with W&B, ended in four ways.
SCRIPT = """
import os, signal, sys, time, wandb
end, folder = sys.argv[1:]
run = wandb.init(
    project="test", name=end, tags=["link=none"], config={"lr": 0.1, "milestones": (1, 2)},
    dir=folder, mode="offline", settings=wandb.Settings(silent=True),
)
for step in range(3000 if end == "killed" else 3):
    run.log({"train/step": step, "eval/loss": 1 / (1 + step)})
if end == "killed":
    # Blocks of 32 KiB are on disk soon, but not at once.
    time.sleep(2)
    os.kill(os.getpid(), signal.SIGKILL)
if end != "stopped":
    run.summary.update({"final/loss": float("nan") if end == "diverged" else 0.25})
run.finish(exit_code=3 if end == "failed" else 0)
"""
ENDS = ("finished", "diverged", "failed", "killed", "stopped")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    started = [subprocess.Popen([sys.executable, "-c", SCRIPT, end, str(folder)]) for end in ENDS]
    for process in started:
        process.wait(scaled(90))
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> Mapping[str, RecordedRun]:
    return {run.name: run for run in read_runs(folder)}


@pytest.mark.slow
def test_a_run_is_read_back_whole(runs: Mapping[str, RecordedRun]) -> None:
    run = runs["finished"]
    assert run.tags == ("link=none",)
    assert run.config["lr"] == 0.1
    assert run.config["milestones"] == [1, 2]
    assert [item["train/step"] for item in run.history] == [0, 1, 2]
    assert [item["eval/loss"] for item in run.history] == pytest.approx([1, 1 / 2, 1 / 3])
    assert run.summary["final/loss"] == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_only_what_trained_to_its_end_is_complete(
    runs: Mapping[str, RecordedRun], end: str
) -> None:
    assert runs[end].complete == (end in ("finished", "diverged"))


@pytest.mark.slow
def test_a_killed_run_is_read_up_to_there(runs: Mapping[str, RecordedRun]) -> None:
    assert runs["killed"].exit_code is None
    assert 0 < len(runs["killed"].history) <= 3000


@pytest.mark.slow
def test_a_figure_that_is_no_number_survives(runs: Mapping[str, RecordedRun]) -> None:
    """Here not as NaN, but as something: the run has been measured."""
    assert runs["diverged"].summary["final/loss"] is None


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_file_cut_short_is_not_complete(
    runs: Mapping[str, RecordedRun], share: float, tmp_path: Path
) -> None:
    whole = runs["finished"].file.read_bytes()
    cut = tmp_path / "run-cut.wandb"
    cut.write_bytes(whole[: int(share * len(whole))])
    run = read_run(cut)
    assert run is None or not run.complete


@pytest.mark.slow
def test_what_is_no_run_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "wandb" / "offline-run-1" / "run-1.wandb"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"nothing of the kind" * 100)
    assert read_runs(tmp_path) == []


def test_a_folder_without_runs(tmp_path: Path) -> None:
    assert read_runs(tmp_path) == []


RUN = RecordedRun(
    Path("old"),
    tags=("iid", "link=none"),
    config={"tau": 8, "lr": 0.1, "versions": {"torch": "2.13"}},
    summary={"final/loss": 0.5},
    exit_code=0,
)
WANTED = {"tau": 8, "lr": 0.1}


def test_the_newest_complete_run_of_a_configuration_counts() -> None:
    newer = replace(RUN, file=Path("newer"))
    killed = replace(RUN, file=Path("killed"), exit_code=None)
    assert matching([RUN, newer, killed], WANTED, ["link=none"]) is newer


@pytest.mark.parametrize(
    "other",
    [
        replace(RUN, config={**RUN.config, "tau": 2}),
        replace(RUN, config={"tau": 8}),
        replace(RUN, config={**RUN.config, "momentum": 0.9}),
        replace(RUN, tags=("iid", "link=200mbit")),
        replace(RUN, exit_code=1),
        replace(RUN, exit_code=None),
        replace(RUN, summary={"eval/loss": 0.5}),
    ],
)
def test_another_run_does_not_count(other: RecordedRun) -> None:
    assert matching([other], WANTED, ["link=none"]) is None


def test_versions_may_differ() -> None:
    other = replace(RUN, config={**RUN.config, "versions": {"torch": "3.0"}})
    assert matching([other], WANTED, ["link=none"]) is other
