"""Pins that what fails on one rank while Accelerate saves or loads is an error on every rank.

Every rank has a folder of its own here, as machines without a common file system do.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from commhooks import CheckpointError
from tests.accelerated import Accelerated, Scaling, normed
from tests.cases import Case
from tests.harness import rank_outcomes, run_ranks

CASE = normed(Case("OverlapLocalSGD", {"tau": 2}))
SCALING = Scaling({0: [], 1: []})


class Counter:
    """Something to give to ``register_for_checkpointing``."""

    def state_dict(self) -> dict[str, int]:
        return {"seen": 3}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["seen"] != 3:
            raise ValueError("an odd number of things")


def prepared() -> Accelerated:
    run = Accelerated(CASE, SCALING)
    run.accelerator.register_for_checkpointing(Counter())
    return run


def save(folder: Path) -> None:
    run = prepared()
    for _ in range(3):
        run.step()
    run.accelerator.save_state(str(folder))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    run_ranks(save, 2, folder)
    return folder


@pytest.fixture
def folders(kept: Path, tmp_path: Path) -> list[Path]:
    return [shutil.copytree(kept, tmp_path / f"disk{rank}") for rank in range(2)]


def refused(folders: list[Path]) -> tuple[str, str, bool]:
    """The error, and whether it left the run as it was and able to go on."""
    run = prepared()
    run.step()
    before, random = run.x, torch.get_rng_state()
    moments = str(run.optimizers[0].state_dict())
    with pytest.raises(Exception) as refusal:  # noqa: PT011 - looked at by the test
        run.accelerator.load_state(str(folders[dist.get_rank()]))
    unchanged = (
        torch.equal(run.x, before)
        and torch.equal(torch.get_rng_state(), random)
        and str(run.optimizers[0].state_dict()) == moments
    )
    run.step()
    run.state.finish()
    return type(refusal.value).__name__, str(refusal.value), unchanged


def missing(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


ACCELERATES = (
    "model.safetensors",
    "optimizer.bin",
    "scheduler.bin",
    "scaler.pt",
    "random_states_1.pkl",
    "custom_checkpoint_0.pkl",
    "custom_checkpoint_1.pkl",
)


@pytest.mark.parametrize("damage", [missing, cut])
@pytest.mark.parametrize("name", [*ACCELERATES, "commhooks-objects-rank-00001-of-00002.pkl"])
def test_a_bad_file_on_one_rank_is_named_on_every_rank(
    folders: list[Path], name: str, damage: Callable[[Path], object]
) -> None:
    damage(folders[1] / name)
    for kind, message, unchanged in run_ranks(refused, 2, folders):
        assert kind == "CheckpointError"
        assert message.startswith("Rank 1: ")
        assert str(folders[1] / name) in message
        assert unchanged


def other_shapes(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    values = load_file(path)
    values["0.weight"] = torch.zeros(9, 9)
    save_file(values, path)


def other_groups(path: Path) -> None:
    values = torch.load(path, weights_only=False)
    values["param_groups"][0]["params"].pop()
    torch.save(values, path)


def one_too_many(path: Path) -> None:
    shutil.copy(path, path.with_name("custom_checkpoint_2.pkl"))


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("model.safetensors", other_shapes, "'0.weight', (9, 9) in the checkpoint and (7, 5)"),
        ("optimizer.bin", other_groups, "its parameter groups hold [5] parameters, here [6]"),
        ("custom_checkpoint_0.pkl", one_too_many, "has 3 files custom_checkpoint_N.pkl"),
    ],
)
def test_files_of_another_run_on_one_rank_are_named_on_every_rank(
    folders: list[Path], name: str, damage: Callable[[Path], object], words: str
) -> None:
    damage(folders[1] / name)
    for kind, message, unchanged in run_ranks(refused, 2, folders):
        assert kind == "CheckpointError"
        assert message.startswith("Rank 1: ")
        assert words in message
        assert unchanged


def test_a_folder_that_one_rank_lacks_is_an_error_on_every_rank(folders: list[Path]) -> None:
    shutil.rmtree(folders[1])
    (kind_0, message_0, unchanged_0), (kind_1, _, unchanged_1) = run_ranks(refused, 2, folders)
    assert (kind_0, kind_1) == ("CheckpointError", "ValueError")
    assert message_0.startswith("Rank 1: ValueError")
    assert unchanged_0
    assert unchanged_1


def load_with_a_bad_object(folder: Path) -> None:
    """Only the object itself can tell that its values are wrong, when all else is loaded."""
    run = prepared()
    dist.barrier()
    run.accelerator.load_state(str(folder / str(dist.get_rank())))


def test_an_object_that_refuses_its_values_on_one_rank_stops_every_rank(
    kept: Path, tmp_path: Path
) -> None:
    for rank in range(2):
        shutil.copytree(kept, tmp_path / str(rank))
    torch.save({"seen": 4}, tmp_path / "1" / "custom_checkpoint_1.pkl")
    first, second = rank_outcomes(load_with_a_bad_object, 2, tmp_path)
    assert isinstance(first.error, CheckpointError), first.describe()
    assert "load_state failed on some rank: rank 1: ValueError: an odd number" in str(first.error)
    assert isinstance(second.error, ValueError), second.describe()


def save_and_go_on(folder: Path, place: str) -> tuple[str, bool]:
    """Saves into a disk that is full for one rank, and trains on."""
    run = prepared()
    run.step()
    before = run.x

    def full(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        if run.accelerator.process_index == 1:
            raise OSError(28, "No space left on device")

    if place == "a hook of the script":
        run.accelerator.register_save_state_pre_hook(full)
    elif place == "the folder" and dist.get_rank() == 1:
        (folder / "taken").touch()
        folder = folder / "taken"
    elif place == "the rank's file" and dist.get_rank() == 1:
        # The directory is taken by a file of the same name as the draft's.
        (folder / ".commhooks-rank-00001-of-00002.pt.draft").mkdir(parents=True)
    with pytest.raises(Exception) as failure:  # noqa: PT011 - looked at by the test
        run.accelerator.save_state(str(folder))
    unchanged = torch.equal(run.x, before)
    run.step()
    run.state.finish()
    return f"{type(failure.value).__name__}: {failure.value}", unchanged


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("a hook of the script", "No space left"),
        ("the rank's file", "IsADirectoryError"),
        ("the folder", "FileExistsError"),
    ],
)
def test_a_rank_that_cannot_save_stops_every_rank_and_changes_nothing(
    tmp_path: Path, place: str, words: str
) -> None:
    (first, unchanged_0), (second, unchanged_1) = run_ranks(save_and_go_on, 2, tmp_path, place)
    assert first.startswith("CheckpointError")
    assert "ank 1: " in first
    assert words in first
    assert words in second
    assert unchanged_0
    assert unchanged_1
