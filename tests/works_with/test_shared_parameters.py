"""Pins that a parameter belongs to one state: two would average it, in turn and at other times."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import commhooks
from tests.diloco.family import deep_model
from tests.harness import run_ranks
from tests.optimizers.warnings_of import logged_warnings
from tests.sharded.training import TIDY, islands_of, shard
from tests.training import Form, attach, wrapped
from tests.workload import gradient, initialise, ragged_model, trained


class Headed(nn.Module):
    """A trunk, which may be another model's, too, and a head of its own."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.trunk(x)))
        return y


def a_trunk() -> nn.Module:
    return nn.Sequential(initialise(nn.Linear(5, 7)))


def registered(
    module: nn.Module, form: Form = "register", **options: Any
) -> tuple[commhooks.CommHookState, DistributedDataParallel]:
    """A state on a DDP model of ``module``, after its first forward."""
    state, model = commhooks.LocalSGD(tau=2), wrapped(module, **options)
    attach(state, model, [SGD(trained(module), lr=0.1)], form)
    model(torch.ones(4, 5))
    return state, model


def by_identity() -> tuple[nn.Module, nn.Module]:
    trunk = a_trunk()
    return Headed(trunk), Headed(trunk)


def the_whole_and_a_part() -> tuple[nn.Module, nn.Module]:
    trunk = a_trunk()
    return Headed(trunk), trunk


def the_same_module() -> tuple[nn.Module, nn.Module]:
    module = Headed(a_trunk())
    return module, module


def by_memory() -> tuple[nn.Module, nn.Module]:
    first, second = Headed(a_trunk()), Headed(a_trunk())
    mine: Any = first.trunk
    other: Any = second.trunk
    other[0].weight = nn.Parameter(mine[0].weight.detach())
    return first, second


SHARED: list[tuple[Callable[[], tuple[nn.Module, nn.Module]], str]] = [
    (by_identity, "trunk.0.weight"),
    (the_whole_and_a_part, "0.weight"),
    (the_same_module, "trunk.0.weight"),
    (by_memory, "trunk.0.weight"),
]


def refused(
    make: Callable[[], tuple[nn.Module, nn.Module]], first: Form, second: Form
) -> tuple[str, int]:
    """What is said of the second registration; the first state trains on."""
    one, two = make()
    state, model = registered(one, first)
    with pytest.raises(commhooks.RegistrationError) as caught:
        registered(two, second)
    gradient(model, dist.get_rank(), 1)
    return str(caught.value), state.stats.step


@pytest.mark.parametrize(("make", "name"), SHARED, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("form", ["register", "hook"])
def test_two_states_cannot_have_one_parameter(
    make: Callable[[], tuple[nn.Module, nn.Module]], name: str, form: Form
) -> None:
    """Both averaged the trunk, each half-way through the other's cycle, and nothing was said."""
    other: Form = "hook" if form == "register" else "register"
    for second in (form, other):
        for message, steps in run_ranks(refused, 2, make, form, second):
            assert f"'{name}'" in message
            assert "LocalSGD(tau=2" in message
            assert "close()" in message
            assert steps == 1


def on_one_rank_alone() -> str:
    trunk = a_trunk()
    _, _model = registered(Headed(trunk))
    with pytest.raises(commhooks.RegistrationError) as caught:
        registered(Headed(trunk if dist.get_rank() == 1 else a_trunk()))
    return str(caught.value)


def test_it_is_refused_on_every_rank() -> None:
    first, second = run_ranks(on_one_rank_alone, 2, group_timeout=600.0)
    assert "rank 1: Parameter 'trunk.0.weight'" in first
    assert second.startswith("Parameter 'trunk.0.weight'")


def shards() -> list[str]:
    mesh = islands_of(2)
    messages = []
    trunk = shard(deep_model(torch.float32), mesh)
    whole = nn.Sequential(trunk, nn.Linear(3, 3))
    fully_shard(whole, mesh=mesh["shard"])
    kept = []
    for model in (trunk, whole):
        state = commhooks.LocalSGD(tau=2, process_group=mesh["island"].get_group())
        kept.append(state)
        try:
            state.register(model, SGD(model.parameters(), lr=0.1))
        except commhooks.RegistrationError as error:
            messages.append(str(error))
    return messages


def test_nor_one_that_is_sharded() -> None:
    for messages in run_ranks(shards, 4, tidy=TIDY):
        (message,) = messages
        assert "averaged by another state already" in message
        assert "'0.0.weight'" in message


# What may share.


def closed() -> None:
    trunk = a_trunk()
    state, _model = registered(Headed(trunk))
    state.finish()
    state.close()
    registered(Headed(trunk))


def a_state_that_is_gone() -> None:
    trunk = a_trunk()
    registered(Headed(trunk))
    registered(Headed(trunk))


def a_state_that_waits_to_be_collected() -> None:
    """On the second rank alone: when the collector comes is different on every rank."""
    gc.disable()
    trunk = a_trunk()
    cycle: list[Any] = [registered(Headed(trunk))]
    if dist.get_rank():
        cycle.append(cycle)
    del cycle
    registered(Headed(trunk))


def a_model_that_is_gone() -> None:
    """As in a sweep that keeps its states for their figures."""
    trunk = a_trunk()
    states = [registered(Headed(trunk))[0] for _ in range(3)]
    assert [state.stats.step for state in states] == [0, 0, 0]


def a_frozen_trunk() -> None:
    trunk = a_trunk().requires_grad_(False)
    _kept = [registered(Headed(trunk)) for _ in range(2)]


def a_module_wrapped_without_a_state() -> None:
    trunk = a_trunk()
    _model = wrapped(Headed(trunk))
    registered(Headed(trunk))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 7, bias=False)
        self.decoder = nn.Linear(5, 7, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.encoder(x) + self.decoder(x)
        return y


def tied() -> None:
    _kept = [registered(Tied()) for _ in range(2)]


def after_a_refusal() -> None:
    """A registration that was refused has taken nothing."""
    module = ragged_model()
    model = wrapped(module)
    with pytest.raises(commhooks.RegistrationError, match="owns none"):
        commhooks.LocalSGD(tau=2).register(model, SGD(trained(ragged_model()), lr=0.1))
    commhooks.LocalSGD(tau=2).register(model, SGD(trained(module), lr=0.1))


@pytest.mark.parametrize(
    "allowed",
    [
        closed,
        a_state_that_is_gone,
        a_state_that_waits_to_be_collected,
        a_model_that_is_gone,
        a_frozen_trunk,
        a_module_wrapped_without_a_state,
        tied,
        after_a_refusal,
    ],
    ids=lambda each: each.__name__,
)
def test_parameters_are_free_again(allowed: Callable[[], None]) -> None:
    run_ranks(allowed, 2)


def a_new_optimizer_for_a_new_state() -> list[str]:
    """The first state is kept for its figures, its model is gone."""
    module = ragged_model()
    with logged_warnings() as warnings:
        kept = []
        for _ in range(2):
            state, model = commhooks.AllReduce(), wrapped(module)
            optimizer = SGD(trained(module), lr=0.1)
            state.register(model, optimizer)
            kept.append(state)
            gradient(model, dist.get_rank(), 1)
            optimizer.step()
            del model, optimizer
    return warnings


def test_a_state_without_a_model_watches_no_optimizer() -> None:
    """It said that an optimizer was not given to it, which another state had been given."""
    for warnings in run_ranks(a_new_optimizer_for_a_new_state, 2):
        assert warnings == []
