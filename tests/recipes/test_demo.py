"""recipes/demo.py, with the small model."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import demo
from common.launch import RECIPES
from common.report import Results, read_results, results_table, write_results

RESULTS = Results(
    name="easgd tau=8",
    algorithm="easgd",
    workers=2,
    steps=1_000,
    samples=64_000,
    train_loss=0.5,
    loss=0.25,
    accuracy=0.9625,
    seconds=12.34,
    seconds_exposed=0.5,
    seconds_hidden=1.25,
    bytes_sent=1.5e9,
    rounds=27,
    wandb_dir=None,
)


@pytest.mark.slow
def test_both_are_trained_and_shown_side_by_side(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(RECIPES / "demo.py"), "--model", "small-cnn", "--epochs", "40"),
            *("--target", "0.5", "--output-dir", str(tmp_path / "runs")),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    overlap, ddp = (read_results(folder / f"{name}.json") for name in demo.CONTENDERS)
    assert overlap.config["seed"] == ddp.config["seed"]
    assert overlap.label_counts == ddp.label_counts
    for results in (overlap, ddp):
        assert results.accuracy is not None
        assert results.accuracy > 0.5
        assert math.isfinite(results.train_loss)
        # There, and not after all epochs.
        assert results.steps < 400
    last_table = done.stdout[done.stdout.rindex("small-cnn on digits") :]
    for figure in (f"{overlap.accuracy:.1%}", f"{ddp.accuracy:.1%}", "overlap-local-sgd", "ddp"):
        assert figure in last_table
    assert f"leet {folder / 'wandb'}" in last_table
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 2


@pytest.mark.parametrize(("accuracy", "status"), [(0.951, 0), (0.95, 1), (0.2, 1)])
def test_the_status_says_whether_both_learned(
    accuracy: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(algorithm: str, options: demo.Demo, folder: Path) -> Results:
        return replace(RESULTS, accuracy=0.99 if algorithm == "ddp" else accuracy)

    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr("sys.argv", ["demo.py", "--output-dir", str(tmp_path)])
    assert demo.main() == status


def test_results_survive_being_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    write_results(RESULTS, path)
    assert read_results(path) == RESULTS
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_the_table_has_a_column_a_run() -> None:
    console = Console(width=100)
    plain = replace(RESULTS, algorithm="ddp", seconds_exposed=None, seconds_hidden=None)
    with console.capture() as captured:
        console.print(results_table([RESULTS, plain], "Two"))
    lines = [line.replace("│", " ").split() for line in captured.get().splitlines()]
    assert ["test", "accuracy,", "consensus", "model", "96.2%", "96.2%"] in lines
    assert ["communication", "exposed", "(s)", "0.50", "-"] in lines
    assert ["sent", "per", "worker", "(MB)", "1,500.0", "1,500.0"] in lines
    assert "not measured" in captured.get()
