"""recipes/vision.py through its command line, on two real processes."""

import math
from pathlib import Path

import pytest

from common.launch import RECIPES
from common.models import build_model
from common.traffic import gradient_bytes
from tests.harness.script import ScriptFailed, run_script
from tests.recipes.cifar10_files import write_cifar10
from tests.recipes.runs import OVERLAP, Run, train

pytestmark = pytest.mark.slow

MODEL_BYTES = gradient_bytes(build_model("small-cnn", channels=1, classes=10))
# A run of 12 steps, and what its last evaluation says under DDP.
SHORT = ("--max-steps", "12", "--lr-warmup-epochs", "0")


@pytest.fixture(scope="module")
def plain_ddp(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("ddp"), "ddp", *SHORT)


def test_a_run_reports_what_it_did(overlap_run: Run) -> None:
    results = overlap_run.results
    # 1,437 images over 2 workers fill 22 batches of 32 each.
    assert (results.workers, results.steps, results.samples) == (2, 44, 44 * 64)
    assert results.rounds == 11
    # One model a round and one for finish(); what evaluation takes is not counted.
    assert results.bytes_sent == 12 * MODEL_BYTES
    assert results.accuracy is not None
    assert results.accuracy > 0.3
    # Every one of the 360 test images counts once, however they were spread over the workers.
    assert results.accuracy * 360 == pytest.approx(round(results.accuracy * 360), abs=1e-3)
    assert math.isfinite(results.loss + results.train_loss)
    assert results.seconds > 0
    assert results.seconds_exposed is not None
    assert results.seconds_exposed >= 0
    assert results.seconds_hidden is not None
    assert results.seconds_hidden > 0
    assert results.config["beta"] == 0.5
    assert [sum(counts) for counts in results.label_counts] == [718, 718]


def test_a_run_ends_with_a_table(overlap_run: Run) -> None:
    for row in ("consensus model", "exposed (s)", "hidden (s)", "sent per worker (MB)"):
        assert row in overlap_run.printed
    assert overlap_run.printed.count("test accuracy, consensus model") == 1
    assert "Traceback" not in overlap_run.printed
    assert "Warning" not in overlap_run.printed


def test_the_same_seed_gives_the_same_run(overlap_run: Run, tmp_path: Path) -> None:
    first, again = overlap_run.results, train(tmp_path, "overlap-local-sgd", *OVERLAP).results
    assert (again.loss, again.train_loss, again.accuracy) == (
        first.loss,
        first.train_loss,
        first.accuracy,
    )


def test_plain_ddp_says_what_it_does_not_know(plain_ddp: Run) -> None:
    results = plain_ddp.results
    assert (results.steps, results.rounds) == (12, None)
    assert results.bytes_sent == 12 * MODEL_BYTES
    assert results.seconds_exposed is None
    assert results.seconds_hidden is None
    assert "not measured" in plain_ddp.printed


def test_all_reduce_is_plain_ddp(plain_ddp: Run, tmp_path: Path) -> None:
    results = train(tmp_path, "all-reduce", *SHORT).results
    assert results.loss == pytest.approx(plain_ddp.results.loss, abs=1e-6)
    assert results.train_loss == pytest.approx(plain_ddp.results.train_loss, abs=1e-6)
    assert results.bytes_sent == plain_ddp.results.bytes_sent
    assert results.seconds_exposed is not None


def test_local_sgd_where_each_worker_has_a_class_of_its_own(tmp_path: Path) -> None:
    results = train(
        tmp_path, "local-sgd", *SHORT, "--tau", "4", "--partition", "major-class"
    ).results
    assert (results.steps, results.rounds) == (12, 3)
    # A round waits for its result, so there is nothing to hide behind.
    assert results.seconds_exposed is not None
    assert results.seconds_exposed > 0
    for counts in results.label_counts:
        assert max(counts) >= 0.64 * sum(counts)
    # Chance is ln 10 = 2.303.
    assert results.train_loss < 2.3


def test_bmuf_after_steps_of_gradient_averaging(tmp_path: Path) -> None:
    options = ("--zeta", "0.9", "--nesterov", "--warmup-steps", "4", "--partition", "dirichlet")
    results = train(tmp_path, "bmuf", *SHORT, "--tau", "4", *options).results
    assert (results.steps, results.rounds) == (12, 2)
    # Four gradients, two rounds of parameters, and finish().
    assert results.bytes_sent == (4 + 2 + 1) * MODEL_BYTES
    assert results.train_loss < 2.4


def test_slowmo_and_an_outer_adamw(tmp_path: Path) -> None:
    for algorithm, options in (
        ("slowmo", ("--beta", "0.7", "--slow-lr", "0.9")),
        ("diloco", ("--outer", "adamw", "--outer-lr", "0.01", "--delay", "1", "--alpha", "0.5")),
    ):
        folder = tmp_path / algorithm
        folder.mkdir()
        results = train(folder, algorithm, "--tau", "4", "--max-steps", "16", *options).results
        assert (results.steps, results.rounds) == (16, 4)


def test_a_learning_rate_that_is_right_for_ddp(plain_ddp: Run, tmp_path: Path) -> None:
    """Scaled, it is the same as to give EASGD's: (m + 1) / m times as much; DDP's factor is 1."""
    ends = []
    for name, options in (("scaled", ("0.04", "--scale-lr")), ("given", ("0.06",))):
        folder = tmp_path / name
        folder.mkdir()
        ends.append(train(folder, "easgd", *SHORT, "--tau", "4", "--lr", *options))
    scaled, given = ends
    assert scaled.results.loss == pytest.approx(given.results.loss, abs=1e-5)
    assert "scaled" in scaled.results.name
    assert "learning rate" not in scaled.printed
    assert "--scale-lr" in given.printed
    ddp = train(tmp_path, "ddp", *SHORT, "--scale-lr").results
    assert ddp.loss == plain_ddp.results.loss


def test_easgd_on_resnet18_with_accumulation_in_bf16(tmp_path: Path) -> None:
    results = train(
        tmp_path,
        "easgd",
        *("--model", "resnet18", "--batch-size", "8", "--tau", "1", "--max-steps", "2"),
        *("--alpha", "0.3", "--accumulate", "3", "--mixed-precision", "bf16"),
    ).results
    # Two optimizer steps of three batches of 8 on each of two workers.
    assert (results.steps, results.rounds, results.samples) == (2, 2, 2 * 3 * 8 * 2)
    assert math.isfinite(results.loss)


def test_islands_with_few_bits_between_them(tmp_path: Path) -> None:
    """Two islands of two processes; with BatchNorm's statistics, which all of them average."""
    options = ("--island", "2", "--compression", "int8", "--tau", "2", "--max-steps", "6")
    results = train(tmp_path, "overlap-local-sgd", *options, workers=4).results
    assert (results.workers, results.steps, results.rounds) == (4, 6, 3)
    assert "island=2 int8" in results.name
    assert math.isfinite(results.loss)


def test_cocod_sgd_on_cifar10(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_cifar10(data, per_batch=32)
    results = train(
        tmp_path,
        "cocod-sgd",
        *("--dataset", "cifar10", "--data-dir", str(data), "--epochs", "1", "--tau", "2"),
        *("--loader-workers", "1"),
        script=Path(__file__).with_name("vision_on_tiny_cifar10.py"),
    ).results
    # 160 images over 2 workers fill 2 batches of 32 each.
    assert (results.steps, results.rounds, results.samples) == (2, 1, 128)
    assert math.isfinite(results.loss)


def test_a_refusal_is_one_line_from_one_worker(tmp_path: Path) -> None:
    with pytest.raises(ScriptFailed) as failure:
        train(tmp_path, "cocod-sgd", "--beta", "0.7")
    assert failure.value.printed.count("error: --beta: not an option of cocod-sgd") == 1
    assert not (tmp_path / "results.json").exists()


def test_one_process_by_itself_is_refused(tmp_path: Path) -> None:
    """What accelerate launch --cpu starts, whatever its --num_processes."""
    with pytest.raises(ScriptFailed, match="status 2") as failure:
        run_script(RECIPES / "vision.py", ["--wandb", "disabled"], 1, folder=tmp_path, timeout=60)
    assert "accelerate launch --multi_gpu --num_processes 2" in failure.value.printed
