"""What a run leaves in W&B, read back with ``wandb leet inspect``."""

from importlib.metadata import version
from typing import Any

import pytest

from common.schedules import step_schedule
from tests.recipes.runs import Run, records, summary

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recorded(overlap_run: Run) -> list[dict[str, Any]]:
    return records(overlap_run)


def items(recorded: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The history records that hold ``metric``."""
    history = [record["history"]["item"] for record in recorded if record["type"] == "history"]
    return [item for item in history if metric in item]


def test_the_run_says_what_it_is(recorded: list[dict[str, Any]]) -> None:
    (run,) = [record["run"] for record in recorded if record["type"] == "run"]
    assert run["display_name"] == "overlap t4 lr0.05 s0 b0.5 iid 2w"
    assert run["run_id"].startswith("overlap-t4-lr0.05-s0-b0.5-iid-2w-")
    assert run["project"] == "commhooks"
    assert run["run_group"] == "vision digits small-cnn"
    assert run["job_type"] == "train"
    assert set(run["tags"]) == {"overlap-local-sgd", "small-cnn", "digits", "iid", "extra"}


def test_the_config_holds_hyper_parameters_and_versions(overlap_run: Run) -> None:
    config = summary(overlap_run)["config"]
    expected = {
        "algorithm": "overlap-local-sgd",
        "tau": 4,
        "alpha": 0.6,
        "beta": 0.5,
        "warmup_steps": 0,
        "lr": 0.05,
        "epochs": 2,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "batch_size": 32,
        "dataset": "digits",
        "partition": "iid",
        "model": "small-cnn",
        "seed": 0,
        "mixed_precision": "no",
        "accumulate": 1,
        "workers": 2,
    }
    assert expected.items() <= config.items()
    assert config["versions"]["torch"] == version("torch")
    assert {"python", "commhooks", "accelerate", "wandb"} <= config["versions"].keys()
    # An online run would publish the folders of the machine it ran on.
    assert str(overlap_run.folder) not in str(config)


def test_every_family_has_its_axis(recorded: list[dict[str, Any]]) -> None:
    metrics = [record["metric"] for record in recorded if record["type"] == "metric"]
    axes = {
        metric.get("glob_name", metric.get("name")): metric.get("step_metric") for metric in metrics
    }
    assert axes == {
        "train/step": None,
        "train/samples": None,
        "time/seconds": None,
        "train/*": "train/step",
        "eval/*": "train/step",
        "comm/*": "train/step",
        "by_samples/*": "train/samples",
        "by_time/*": "time/seconds",
    }


def test_every_record_can_be_drawn_against_every_axis(recorded: list[dict[str, Any]]) -> None:
    history = items(recorded, "_step")
    for axis in ("train/step", "train/samples", "time/seconds"):
        values = [item[axis] for item in history]
        assert values == sorted(values)
    assert [item["train/samples"] for item in history] == [
        item["train/step"] * 64 for item in history
    ]


def test_the_learning_rate_follows_the_schedule(recorded: list[dict[str, Any]]) -> None:
    """One tick an optimizer step: not one a process, as Accelerate would have it."""
    rates = [item["train/lr"] for item in items(recorded, "train/lr")]
    expected = [
        0.05 * step_schedule(step, start=0.1, warmup_steps=22, milestones=[22, 37], decay=0.1)
        for step in range(44)
    ]
    assert rates == pytest.approx(expected)


def test_curves_are_there_for_every_axis(recorded: list[dict[str, Any]]) -> None:
    evaluations = items(recorded, "eval/accuracy")
    assert [item["train/step"] for item in evaluations] == [22, 44]
    for item in evaluations:
        assert item["by_samples/accuracy"] == item["by_time/accuracy"] == item["eval/accuracy"]
        assert item["by_samples/loss"] == item["by_time/loss"] == item["eval/loss"]
        assert item["train/epoch_loss"] > 0
    losses = items(recorded, "train/loss")
    assert len(losses) == 44
    assert all(item["by_time/train_loss"] == item["train/loss"] for item in losses)


def test_communication_is_recorded(recorded: list[dict[str, Any]]) -> None:
    last = items(recorded, "comm/step")[-1]
    assert last["comm/step"] == 44
    assert last["comm/rounds_launched"] == last["comm/rounds_completed"] == 11
    assert last["comm/consensus_distance"] > 0
    for counter in ("bytes_reduced", "seconds_exposed", "seconds_hidden"):
        values = [item[f"comm/{counter}"] for item in items(recorded, f"comm/{counter}")]
        assert values == sorted(values)


def test_the_summary_holds_the_results(overlap_run: Run) -> None:
    found = summary(overlap_run)
    results = overlap_run.results
    assert found["state"] == "finished"
    assert found["summary"]["final/accuracy"] == pytest.approx(results.accuracy)
    assert found["summary"]["final/loss"] == pytest.approx(results.loss)
    assert found["summary"]["final/megabytes_sent"] == pytest.approx(results.bytes_sent / 1e6)


def test_offline_asks_nothing_and_says_where_the_run_lies(overlap_run: Run) -> None:
    assert f"W&B run: {overlap_run.results.wandb_dir}" in overlap_run.printed
    assert "api key" not in overlap_run.printed.lower()
    assert "offline" in str(overlap_run.results.wandb_dir)
