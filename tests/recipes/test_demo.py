"""recipes/demo.py, with the small model."""

import io
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import demo
from commhooks import Stats
from common.launch import RECIPES
from common.pace import Pace, pace_of, write_pace
from common.report import Results, read_results, results_table, write_results
from tests.harness import scaled

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
        timeout=scaled(110),
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
        # Nothing is said twice.
        lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
        assert len(lines) == len(set(lines))
    assert re.search(r"first \d+ steps, the whole demo takes at most \d", done.stdout)
    last_table = done.stdout[done.stdout.rindex("small-cnn on digits") :]
    for figure in (f"{overlap.accuracy:.1%}", f"{ddp.accuracy:.1%}", "overlap-local-sgd", "ddp"):
        assert figure in last_table
    assert f"leet {folder / 'wandb'}" in last_table
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 2
    picture = folder / "accuracy-seconds.png"
    assert picture.stat().st_size > 0
    assert f"time: {picture}" in last_table
    assert done.stdout.splitlines()[-1] == demo.verdict(overlap, ddp, 0.5)


def test_the_verdict_is_one_sentence_with_its_ratios() -> None:
    overlap = replace(RESULTS, steps=100, seconds=25.0, bytes_sent=500e6)
    ddp = replace(RESULTS, steps=80, seconds=100.0, bytes_sent=3_200e6)
    assert demo.verdict(overlap, ddp, 0.95) == (
        "Overlap-Local-SGD was above 95% test accuracy after 25.0 s of training, 4.0 times sooner "
        "than DDP with its 100.0 s; each worker sent 500 MB instead of 3,200 MB, and a step took "
        "0.25 s instead of 1.25 s: it was 5.0 times faster."
    )
    # A small model sends little.
    small = replace(RESULTS, bytes_sent=0.42e6)
    assert "sent 0.4 MB instead of 0.4 MB" in demo.verdict(small, small, 0.95)
    # Where no link can be shaped it may come out the other way, and is said so.
    assert "4.0 times later than DDP with its 25.0 s" in demo.verdict(ddp, overlap, 0.95)
    assert demo.verdict(ddp, overlap, 0.95).endswith("it was 5.0 times slower.")


def test_the_estimate_adds_up_what_the_first_steps_tell() -> None:
    # 0.5 s a step, 2 s an all-reduce: DDP takes 2.5 s a step, and 5 steps hide a round.
    pace = Pace(steps=10, seconds=6.0, seconds_exposed=1.0, all_reduce=2.0, steps_per_epoch=10)
    # Starting 2 x 8, steps 70 x 0.5 and 60 x 2.5, seven evaluations of 2.
    assert demo.estimate(demo.Demo(), pace, 8.0) == (
        "Judging by the first 10 steps, the whole demo takes about 3 min 40 s."
    )
    # Of another model nobody knows how soon it is there: all epochs, 2 and 2.
    other = demo.Demo(model="small-cnn", epochs=2)
    assert demo.estimate(other, pace, 8.0).endswith("takes at most 1 min 20 s.")


def test_the_pace_is_known_after_a_round() -> None:
    none_yet = Stats(step=5, rounds_launched=1)
    assert pace_of(5, 2.0, none_yet, 11) is None
    one = Stats(step=10, rounds_completed=1, seconds_exposed=0.5, seconds_hidden=1.5)
    assert pace_of(10, 4.5, one, 11) == Pace(10, 4.5, 0.5, 2.0, 11)
    assert pace_of(4, 2.0, None, 11) is None
    assert pace_of(5, 2.0, None, 11) == Pace(5, 2.0, 0.0, 0.0, 11)


def test_the_estimate_comes_while_the_run_goes_on(tmp_path: Path) -> None:
    console = Console(width=100, file=io.StringIO())
    with demo.estimating(demo.Demo(), tmp_path, console):
        write_pace(Pace(10, 6.0, 1.0, 2.0, 10), tmp_path / "overlap-local-sgd-pace.json")
        deadline = time.monotonic() + scaled(60)
        while not console.file.getvalue() and time.monotonic() < deadline:  # type: ignore[attr-defined]
            time.sleep(0.01)
    assert "the whole demo takes about" in console.file.getvalue()  # type: ignore[attr-defined]


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
