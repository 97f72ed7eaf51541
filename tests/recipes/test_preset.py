"""recipes/vision.py --preset paper: the published experiment."""

import math
from pathlib import Path
from unittest.mock import Mock

import pytest

from common.errors import RecipeError
from common.options import read_command_line
from tests.recipes.cifar10_files import write_cifar10
from tests.recipes.runs import train
from vision import Config, VisionRun

TINY = Path(__file__).with_name("vision_on_tiny_cifar10.py")


def read(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Config:
    monkeypatch.setattr("sys.argv", ["vision.py", *arguments])
    return read_command_line(Config, "")


def test_what_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = read(monkeypatch, "--preset", "paper").flat(workers=16)
    paper = {
        "dataset": "cifar10",
        "model": "resnet18",
        "batch_size": 128,
        "epochs": 300,
        "lr_start": 0.1,
        "lr": 1.6,
        "lr_warmup_epochs": 5,
        "lr_milestones": (150, 250),
        "lr_decay": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "partition": "iid",
        "algorithm": "overlap-local-sgd",
        "alpha": 0.6,
        "beta": 0.7,
    }
    assert paper.items() <= flat.items()


def test_other_options_override_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read(
        monkeypatch,
        *("--tau", "24", "--beta", "0", "--lr", "0.4", "--preset=paper"),
        *("--partition", "major-class", "--epochs", "3"),
    )
    assert (config.method.tau, config.method.alpha, config.method.beta) == (24, 0.6, 0.0)
    assert (config.training.lr, config.training.epochs) == (0.4, 3)
    assert (config.data.partition, config.data.batch_size) == ("major-class", 128)


@pytest.mark.parametrize("algorithm", ["ddp", "local-sgd", "easgd", "cocod-sgd", "bmuf"])
def test_the_other_algorithms_run_under_it(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """alpha and beta are overlap-local-sgd's, and would be refused here."""
    config = read(monkeypatch, "--preset", "paper", "--algorithm", algorithm)
    assert config.flat(workers=16)["algorithm"] == algorithm
    assert config.training.epochs == 300
    assert config.method.beta is None


def test_without_it_defaults_are_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch) == Config()


def test_an_unknown_preset_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read(monkeypatch, "--preset", "poster")
    assert "--preset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0, 0.1),
        (2.5, 0.85),
        (5, 1.6),
        (149.9, 1.6),
        (150, 0.16),
        (249.9, 0.16),
        (250, 0.016),
        (299.9, 0.016),
    ],
)
def test_the_schedule(epoch: float, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the run's scheduler asks for it, with the 24 full batches of 128 in 50,000 / 16 images."""
    config = read(monkeypatch, "--preset", "paper")
    steps = 50_000 // 16 // config.data.batch_size
    assert steps == 24
    run = Mock(spec=VisionRun, config=config, steps_per_epoch=steps)
    factor = VisionRun.learning_rate_factor(run, round(epoch * steps))
    assert config.training.lr * factor == pytest.approx(rate)


def test_its_learning_rate_is_for_16_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read(monkeypatch, "--preset", "paper")
    config.check_workers(16)
    with pytest.raises(RecipeError, match=r"for 16 workers, and these are 2: .* --lr 0\.2"):
        config.check_workers(2)
    read(monkeypatch, "--preset", "paper", "--lr", "0.2").check_workers(2)


@pytest.mark.slow
def test_it_starts(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_cifar10(data, per_batch=4)
    preset = ("--preset", "paper", "--data-dir", str(data), "--batch-size", "4")
    results = train(
        tmp_path,
        "overlap-local-sgd",
        *(*preset, "--lr", "0.2", "--max-steps", "2", "--tau", "1"),
        script=TINY,
        model=(),
    ).results
    assert (results.steps, results.rounds) == (2, 2)
    assert (results.config["model"], results.config["epochs"]) == ("resnet18", 300)
    assert (results.config["alpha"], results.config["beta"]) == (0.6, 0.7)
    assert math.isfinite(results.loss)
