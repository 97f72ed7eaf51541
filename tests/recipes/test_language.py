"""recipes/language.py through its command line, on real processes."""

import math
from pathlib import Path

import pytest

from common.launch import RECIPES
from common.text import python_text
from common.traffic import gradient_bytes
from common.transformer import ByteTransformer
from tests.harness.script import ScriptFailed
from tests.recipes.runs import Run, records, train

pytestmark = pytest.mark.slow

SMALL = ("--layers", "1", "--width", "32", "--heads", "2", "--context", "32", "--batch-size", "16")
MODEL_BYTES = gradient_bytes(ByteTransformer(context=32, width=32, heads=2, layers=1))


def train_language(
    folder: Path, algorithm: str, *arguments: str, workers: int = 2, launcher: bool = False
) -> Run:
    # Some kilobytes of prose and as many of code, so that testing takes no time.
    text = folder / "mixed.txt"
    whole = python_text()
    text.write_bytes(whole[:150_000] + whole[-150_000:])
    options = ("--text", str(text), "--sample", "40", *arguments)
    script = RECIPES / "language.py"
    return train(
        folder,
        algorithm,
        *options,
        workers=workers,
        script=script,
        model=SMALL,
        launcher=launcher,
    )


@pytest.fixture(scope="module")
def overlap(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_language(
        tmp_path_factory.mktemp("language"),
        "overlap-local-sgd",
        *("--tau", "4", "--beta", "0.5", "--epochs", "2", "--max-steps", "240"),
        *("--eval-every", "60", "--log-every", "20", "--lr", "5e-3", "--wandb", "offline"),
        launcher=True,
    )


def test_it_learns_and_reports_bits_per_byte(overlap: Run) -> None:
    results = overlap.results
    assert (results.workers, results.steps, results.samples) == (2, 240, 240 * 32)
    assert results.rounds == 60
    assert results.bytes_sent == 61 * MODEL_BYTES
    assert results.accuracy is None
    assert results.bits_per_byte is not None
    assert results.bits_per_byte == pytest.approx(results.loss / math.log(2))
    # A uniform guess takes 8 bits a byte; single bytes by their frequency take 4.9.
    assert results.bits_per_byte < 4.2
    assert [sum(counts) for counts in results.label_counts] == [4590, 4590]


def test_it_prints_a_sample_and_a_table(overlap: Run) -> None:
    assert "A sample of the consensus model:\n\ndef " in overlap.printed
    assert "bits per byte, consensus model" in overlap.printed
    assert "test accuracy" not in overlap.printed
    assert "Traceback" not in overlap.printed
    assert "Warning" not in overlap.printed


def test_curves_lie_on_the_same_axes_as_an_image_classifiers(overlap: Run) -> None:
    history = [r["history"]["item"] for r in records(overlap) if r["type"] == "history"]
    evaluations = [item for item in history if "eval/bits_per_byte" in item]
    assert [item["train/step"] for item in evaluations] == [60, 120, 180, 240]
    bits = [item["eval/bits_per_byte"] for item in evaluations]
    assert bits == sorted(bits, reverse=True)
    for item in evaluations:
        assert item["by_time/bits_per_byte"] == item["eval/bits_per_byte"]
    # A tenth of an epoch's 286 steps to warm up, then down; the first step has number 0.
    rates = {i["train/step"]: i["train/lr"] for i in history if "train/lr" in i}
    assert rates[20] == pytest.approx(2e-4 + (5e-3 - 2e-4) * 19 / 29)
    assert rates[60] > rates[120] > rates[240] > 2e-4


def test_accumulation_clipping_bf16_and_going_on(tmp_path: Path) -> None:
    """Half a run, taken up from its checkpoint, ends on the loss of the whole one."""
    options = ("--tau", "4", "--accumulate", "2", "--clip", "0.1", "--mixed-precision", "bf16")
    first, second = tmp_path / "whole", tmp_path / "half"
    for folder in (first, second):
        folder.mkdir()
    steps = ("--max-steps", "12", "--checkpoint-every", "6", "--partition", "major-class")
    whole = train_language(first, "local-sgd", *options, *steps).results
    assert (whole.steps, whole.rounds, whole.samples) == (12, 3, 12 * 2 * 2 * 16)
    for counts in whole.label_counts:
        assert max(counts) >= 0.64 * sum(counts)
    middle = first / "checkpoints" / "checkpoint-00000006"
    again = train_language(second, "local-sgd", *options, *steps, "--resume", str(middle))
    assert "going on after step 6" in again.printed
    assert (again.results.loss, again.results.samples) == (whole.loss, whole.samples)


def test_streaming_diloco_goes_on_with_its_outer_optimizer(tmp_path: Path) -> None:
    """Half a run of two fragments, one of them in flight, ends on the loss of the whole one."""
    form = ("--tau", "4", "--fragments", "2", "--delay", "tau/2", "--merge", "carry")
    steps = ("--max-steps", "12", "--checkpoint-every", "6")
    first, second = tmp_path / "whole", tmp_path / "half"
    for folder in (first, second):
        folder.mkdir()
    whole = train_language(first, "diloco", *form, *steps).results
    # After the steps 2, 6, 10 and 4, 8, 12.
    assert (whole.steps, whole.rounds) == (12, 6)
    middle = first / "checkpoints" / "checkpoint-00000006"
    again = train_language(second, "diloco", *form, *steps, "--resume", str(middle))
    assert "going on after step 6" in again.printed
    assert again.results.loss == whole.loss


def test_islands_that_share_a_model_out_with_fsdp(tmp_path: Path) -> None:
    """Two islands of two processes: each process averages its half of the model with its peer."""
    form = ("--fsdp", "--island", "2", "--tau", "4", "--max-steps", "24", "--eval-every", "12")
    run = train_language(tmp_path, "diloco", *form, "--lr", "5e-3", workers=4, launcher=True)
    assert (run.results.workers, run.results.steps, run.results.rounds) == (4, 24, 6)
    assert run.results.bits_per_byte is not None
    assert run.results.bits_per_byte < 7
    # Half of the model a round, and once more at the end, 2 (m - 1) / m = 1 times.
    assert run.results.bytes_sent == 7 * MODEL_BYTES / 2
    assert "A sample of the consensus model:\n\ndef " in run.printed
    assert "Warning" not in run.printed


def test_fsdp_with_a_round_in_flight_in_few_bits(tmp_path: Path) -> None:
    """With bf16 inside, accumulation and warm-up."""
    form = ("--fsdp", "--island", "2", "--tau", "4", "--compression", "int8", "--max-steps", "12")
    more = ("--warmup-steps", "2", "--accumulate", "2", "--mixed-precision", "bf16")
    results = train_language(tmp_path, "overlap-local-sgd", *form, *more, workers=4).results
    assert (results.steps, results.rounds) == (12, 2)
    assert math.isfinite(results.loss)


def test_ddp_in_islands_in_few_bits(tmp_path: Path) -> None:
    form = ("--island", "node", "--tau", "4", "--max-steps", "8")
    # One machine is one island, and so one worker, which has nobody to send to.
    alone = train_language(tmp_path, "local-sgd", *form).results
    assert (alone.rounds, alone.bytes_sent) == (2, 0)
    options = ("--island", "2", "--compression", "int4", "--tau", "4", "--max-steps", "8")
    pairs = train_language(tmp_path, "local-sgd", *options, workers=4).results
    assert pairs.rounds == 2
    # What finish() sends is in fp32: 3 all-reduces would be 1.5 models, and this is little more
    # than a third of that.
    assert MODEL_BYTES / 2 < pairs.bytes_sent < 0.7 * MODEL_BYTES


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "--fsdp needs to know which ranks hold a model together"),
        (("--island", "3"), "--island 3 does not divide the 2 processes"),
        (("--island", "2", "--checkpoint-every", "5"), "keeps no checkpoints of a sharded model"),
        (("--island", "2", "--mixed-precision", "fp16"), "--fsdp takes --mixed-precision bf16"),
    ],
)
def test_what_fsdp_does_not_go_with_is_refused(
    options: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ScriptFailed, match="status 2") as failure:
        train_language(tmp_path, "diloco", "--fsdp", *options)
    # tyro draws a box around some of them.
    assert reason in " ".join(failure.value.printed.replace("\u2502", " ").split())
