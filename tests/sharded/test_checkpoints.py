"""A sharded run goes on from what was saved, and a checkpoint of its model has the consensus."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from tests.cases import Case
from tests.diloco.family import deep_model, in_flight
from tests.harness import run_ranks
from tests.sharded.training import TIDY, ShardedTrainer, whole

CASES = [
    *in_flight(model=deep_model, island=2),
    Case("CoCoDSGD", {"tau": 2}, 2, model=deep_model, island=2, steps=10),
]


def saved(trainer: ShardedTrainer) -> Mapping[str, Any]:
    return copy.deepcopy(
        {
            "model": trainer.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "state": trainer.state.state_dict(),
        }
    )


def go_on(trainer: ShardedTrainer, values: Mapping[str, Any], step: int) -> None:
    trainer.steps = step
    trainer.model.load_state_dict(values["model"])
    for optimizer, state in zip(trainer.optimizers, values["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    trainer.state.load_state_dict(values["state"])


def resumed(case: Case, every: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """A run, and what comes of the steps after each of its checkpoints."""
    trainer = ShardedTrainer(case)
    steps, checkpoints = [], {}
    for step in range(1, case.steps + 1):
        steps.append(trainer.step())
        if step % every == 0:
            checkpoints[step] = saved(trainer)
    ends = []
    for step, values in checkpoints.items():
        other = ShardedTrainer(case)
        go_on(other, values, step)
        ends.append(
            [steps[k] for k in range(step)] + [other.step() for _ in range(case.steps - step)]
        )
    return steps, ends


def resumed_all() -> list[tuple[list[Tensor], list[list[Tensor]]]]:
    return [resumed(case, every=1 if case.algorithm == "DiLoCo" else 3) for case in CASES]


def test_resumes_bit_for_bit() -> None:
    for rank in run_ranks(resumed_all, 4, tidy=TIDY):
        for steps, ends in rank:
            for end in ends:
                assert all(torch.equal(a, b) for a, b in zip(end, steps, strict=True))


def distributed_checkpoint(folder: str) -> tuple[Tensor, Tensor, Tensor]:
    trainer = ShardedTrainer(CASES[0])
    own = [trainer.step() for _ in range(7)][-1]
    path = Path(folder) / f"island-{trainer.mesh['island'].get_local_rank()}"
    group = trainer.mesh["shard"].get_group()
    with trainer.state.averaged():
        consensus = trainer.x
        save(get_model_state_dict(trainer.model), checkpoint_id=path, process_group=group)
    assert torch.equal(trainer.x, own)
    other = ShardedTrainer(CASES[0])
    values = get_model_state_dict(other.model)
    load(values, checkpoint_id=path, process_group=group)
    set_model_state_dict(other.model, values)
    return own, consensus, whole(other.model)


def test_a_distributed_checkpoint_holds_the_consensus(tmp_path: Path) -> None:
    ranks = run_ranks(distributed_checkpoint, 4, str(tmp_path), tidy=TIDY)
    mean = (ranks[0][0] + ranks[2][0]) / 2
    for _, consensus, loaded in ranks:
        torch.testing.assert_close(consensus, mean, rtol=0, atol=1e-6)
        assert torch.equal(loaded, consensus)


def a_folder_an_island(folder: str) -> tuple[list[Tensor], list[Tensor]]:
    """A run, and one that goes on from what docs/islands.md saves at its seventh step."""
    trainer = ShardedTrainer(CASES[0])
    for _ in range(7):
        trainer.step()
    path = Path(folder) / f"island-{trainer.mesh['island'].get_local_rank()}"
    group, (optimizer,) = trainer.mesh["shard"].get_group(), trainer.optimizers
    weights, moments = get_state_dict(trainer.model, optimizer)
    values: dict[str, Any] = {"model": weights, "optimizer": moments}
    save(values, checkpoint_id=path, process_group=group)
    algorithm = copy.deepcopy(trainer.state.state_dict())
    went_on = [trainer.step() for _ in range(5)]
    other = ShardedTrainer(CASES[0])
    (optimizer,) = other.optimizers
    weights, moments = get_state_dict(other.model, optimizer)
    values = {"model": weights, "optimizer": moments}
    load(values, checkpoint_id=path, process_group=group)
    set_state_dict(
        other.model,
        optimizer,
        model_state_dict=values["model"],
        optim_state_dict=values["optimizer"],
    )
    other.state.load_state_dict(algorithm)
    other.steps = 7
    return went_on, [other.step() for _ in range(5)]


def test_a_folder_an_island_goes_on_bit_for_bit(tmp_path: Path) -> None:
    for went_on, resumed in run_ranks(a_folder_an_island, 4, str(tmp_path), tidy=TIDY):
        assert all(torch.equal(a, b) for a, b in zip(went_on, resumed, strict=True))


def one_folder(folder: str) -> tuple[Tensor, Tensor]:
    """What docs/islands.md warns of: all ranks write one folder while the islands differ."""
    trainer = ShardedTrainer(CASES[0])
    own = [trainer.step() for _ in range(7)][-1]
    save(get_model_state_dict(trainer.model), checkpoint_id=folder)
    other = ShardedTrainer(CASES[0])
    values = get_model_state_dict(other.model)
    load(values, checkpoint_id=folder)
    set_model_state_dict(other.model, values)
    return own, whole(other.model)


def test_one_folder_of_all_ranks_is_a_model_of_nobody(tmp_path: Path) -> None:
    ends = run_ranks(one_folder, 4, str(tmp_path), tidy=TIDY)
    islands = [ends[0][0], ends[2][0]]
    for _, loaded in ends:
        assert torch.equal(loaded, ends[0][1])
        assert not any(torch.equal(loaded, own) for own in islands)
        # Each number is of one island or of the other.
        assert torch.all((loaded == islands[0]) | (loaded == islands[1]))
