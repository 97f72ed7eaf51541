"""What cannot be registered on a sharded model, or done with it, is said on every rank."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD

import commhooks
from tests.cases import Case
from tests.diloco.family import ADAFACTOR, deep_model
from tests.harness import run_ranks
from tests.sharded.training import TIDY, ShardedTrainer, islands_of, shard

Refused = Callable[[], object]


def _register(state: commhooks.CommHookState, model: nn.Module, **options: Any) -> None:
    state.register(model, SGD(model.parameters(), lr=0.1), **options)


def _peers() -> Any:
    return islands_of(2)["island"].get_group()


def without_a_group() -> None:
    _register(commhooks.LocalSGD(tau=2), shard(deep_model(torch.float32), islands_of(2)))


def with_the_wrong_group() -> None:
    mesh = islands_of(2)
    state = commhooks.LocalSGD(tau=2, process_group=mesh["shard"].get_group())
    _register(state, shard(deep_model(torch.float32), mesh))


def with_an_island() -> None:
    state = commhooks.LocalSGD(tau=2, process_group=_peers(), island=2)
    _register(state, shard(deep_model(torch.float32), islands_of(2)))


def with_a_part_that_is_not_sharded() -> None:
    model = deep_model(torch.float32)
    ignored = {next(model.parameters())}
    fully_shard(model, mesh=islands_of(2)["shard"], ignored_params=ignored)
    _register(commhooks.LocalSGD(tau=2, process_group=_peers()), model)


def over_two_dimensions() -> None:
    model = deep_model(torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")))
    _register(commhooks.LocalSGD(tau=2, process_group=_peers()), model)


def with_an_outer_optimizer_of_whole_parameters() -> None:
    state = commhooks.DiLoCo(tau=2, outer=ADAFACTOR, process_group=_peers())
    _register(state, shard(deep_model(torch.float32), islands_of(2)))


def with_a_scaler_in_warmup() -> None:
    state = commhooks.LocalSGD(tau=2, warmup_steps=3, process_group=_peers())
    model = shard(deep_model(torch.float32), islands_of(2))
    _register(state, model, scaler=torch.amp.GradScaler("cpu"))


def with_another_tau_on_one_rank() -> None:
    tau = 3 if dist.get_rank() == 2 else 2
    state = commhooks.LocalSGD(tau=tau, process_group=_peers())
    _register(state, shard(deep_model(torch.float32), islands_of(2)))


def before_it_has_numbers() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    _register(commhooks.LocalSGD(tau=2, process_group=_peers()), shard(model, islands_of(2)))


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (without_a_group, "process_group"),
        (with_the_wrong_group, "the same shard is held by"),
        (with_an_island, "island is for DDP models"),
        (with_a_part_that_is_not_sharded, "0.weight"),
        (over_two_dimensions, "one dimension"),
        (with_an_outer_optimizer_of_whole_parameters, "whole parameters"),
        (with_a_scaler_in_warmup, "GradScaler"),
        (with_another_tau_on_one_rank, "tau: 2 on rank 0, 3 on rank 2"),
        (before_it_has_numbers, "materialise"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_registration(refused: Refused, words: str) -> None:
    for message in run_ranks(_message_of, 4, refused, tidy=TIDY):
        assert words in message


def _message_of(refused: Refused) -> str:
    with pytest.raises(commhooks.RegistrationError) as caught:
        refused()
    return str(caught.value)


def misuse() -> list[str]:
    messages = []
    trainer = ShardedTrainer(Case("LocalSGD", {"tau": 2}, 2, model=deep_model, island=2))
    (optimizer,) = trainer.optimizers
    for wrong in (
        lambda: optimizer.step(lambda: 0.0),
        lambda: _inside(trainer),
        lambda: trainer.state.register(trainer.model, optimizer),
        lambda: trainer.state.join_hook(),
    ):
        with pytest.raises(commhooks.RegistrationError) as caught:
            wrong()
        messages.append(str(caught.value))
    trainer.step()
    trainer.step()
    trainer.step()
    trainer.state.finish()
    trainer.state.close()
    return messages


def starting_apart() -> str:
    torch.manual_seed(dist.get_rank() // 2)
    mesh = islands_of(2)
    model = shard(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)), mesh)
    optimizer = SGD(model.parameters(), lr=0.1)
    state = commhooks.DiLoCo(tau=2, process_group=mesh["island"].get_group())
    state.register(model, optimizer)
    torch.autograd.backward(model(torch.ones(2, 5)).sum())
    with pytest.raises(commhooks.RoundError) as caught:
        optimizer.step()
    return str(caught.value)


def test_islands_that_start_apart() -> None:
    for message in run_ranks(starting_apart, 4, tidy=TIDY):
        assert "begin the local steps with different parameters" in message


def _inside(trainer: ShardedTrainer) -> None:
    with trainer.state.averaged():
        trainer.step()


def test_misuse_leaves_a_model_that_trains_on() -> None:
    for messages in run_ranks(misuse, 4, tidy=TIDY):
        closure, inside, twice, join = messages
        assert "optimizer.step(closure)" in closure
        assert "inside averaged()" in inside
        assert "registered already" in twice
        assert "Join" in join
