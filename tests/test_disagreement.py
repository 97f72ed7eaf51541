"""Pins that ranks that disagree all raise at registration, naming the difference; never a hang."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import commhooks
from tests.harness import rank_outcomes
from tests.training import Form
from tests.workload import batch, ragged_model

MakeState = Callable[[], commhooks.CommHookState]


def by_rank(*states: MakeState) -> commhooks.CommHookState:
    """This rank's state; the last one is for every rank beyond."""
    return states[min(dist.get_rank(), len(states) - 1)]()


def algorithm() -> commhooks.CommHookState:
    return by_rank(lambda: commhooks.LocalSGD(tau=2), lambda: commhooks.CoCoDSGD(tau=2))


def tau() -> commhooks.CommHookState:
    return by_rank(lambda: commhooks.LocalSGD(tau=2), lambda: commhooks.LocalSGD(tau=3))


def alpha() -> commhooks.CommHookState:
    return by_rank(
        lambda: commhooks.OverlapLocalSGD(tau=2, alpha=0.5),
        lambda: commhooks.OverlapLocalSGD(tau=2, alpha=0.6),
    )


def warmup_steps() -> commhooks.CommHookState:
    return by_rank(lambda: commhooks.BMUF(tau=2, warmup_steps=5), lambda: commhooks.BMUF(tau=2))


def bucket_cap_mb() -> commhooks.CommHookState:
    return by_rank(
        lambda: commhooks.EASGD(tau=2, bucket_cap_mb=1.0), lambda: commhooks.EASGD(tau=2)
    )


def only_the_last_rank() -> commhooks.CommHookState:
    first = commhooks.LocalSGD(tau=2)
    last = dist.get_rank() == dist.get_world_size() - 1
    return commhooks.LocalSGD(tau=7) if last else first


DISAGREEMENTS: Sequence[tuple[MakeState, Sequence[str]]] = [
    (algorithm, ["algorithm", "LocalSGD", "CoCoDSGD"]),
    (tau, ["tau", "2", "3"]),
    (alpha, ["alpha", "0.5", "0.6"]),
    (warmup_steps, ["warmup_steps", "5", "0"]),
    (bucket_cap_mb, ["bucket_cap_mb", "1.0", "25.0"]),
    (only_the_last_rank, ["tau", "2", "7", "rank 2"]),
]


def train(make: MakeState, form: Form) -> None:
    """Registers, and makes the first step in the bare form, which sees the bucket only then."""
    model = DistributedDataParallel(ragged_model())
    optimizer = SGD(model.parameters(), lr=0.1)
    state = make()
    if form == "register":
        state.register(model, optimizer)
    else:
        model.register_comm_hook(state, commhooks.comm_hook)
        x, y = batch(dist.get_rank(), 1)
        torch.autograd.backward(nn.functional.mse_loss(model(x), y))


@pytest.mark.parametrize("form", ["register", "hook"])
@pytest.mark.parametrize(("make", "words"), DISAGREEMENTS, ids=lambda v: getattr(v, "__name__", ""))
def test_every_rank_names_the_difference(make: MakeState, words: Sequence[str], form: Form) -> None:
    """With a group timeout of ten minutes, so that a rank that waited would be found stuck."""
    for outcome in rank_outcomes(train, 3, make, form, timeout=30.0, group_timeout=600.0):
        assert isinstance(outcome.error, commhooks.RegistrationError), outcome.describe()
        assert all(word in str(outcome.error) for word in words)


def differing_shapes() -> nn.Module:
    """Which DDP compares too, unless it is told that the ranks have built the same model."""
    return nn.Linear(5 + dist.get_rank(), 3)


def differing_dtypes() -> nn.Module:
    """DDP itself compares shapes, but not formats."""
    return ragged_model(torch.float64 if dist.get_rank() else torch.float32)


def differing_strides() -> nn.Module:
    module = ragged_model()
    if dist.get_rank():
        first = module.get_submodule("0")
        assert isinstance(first, nn.Linear)
        first.weight = nn.Parameter(first.weight.detach().T.contiguous().T)
    return module


def differing_order() -> nn.Module:
    """The same shapes under names that come in another order."""
    names = ["b", "a"] if dist.get_rank() else ["a", "b"]
    module = nn.Module()
    for name in names:
        module.register_parameter(name, nn.Parameter(torch.ones(3)))
    return module


def first_backward(make: Callable[[], nn.Module]) -> None:
    """The bare form sees parameters only then."""
    model = DistributedDataParallel(make(), init_sync=False)
    model.register_comm_hook(commhooks.LocalSGD(tau=2), commhooks.comm_hook)
    first = next(model.module.parameters())
    model(torch.ones(2, first.shape[1], dtype=first.dtype)).sum().backward()


def test_parameters_that_differ_in_the_bare_form() -> None:
    outcomes = rank_outcomes(first_backward, 2, differing_shapes, timeout=30.0, group_timeout=600.0)
    for outcome in outcomes:
        assert isinstance(outcome.error, commhooks.RegistrationError), outcome.describe()
        assert all(word in str(outcome.error) for word in ("(3, 5)", "(3, 6)")), str(outcome.error)


def register_module(make: Callable[[], nn.Module]) -> None:
    model = DistributedDataParallel(make(), init_sync=False)
    optimizer = SGD(model.parameters(), lr=0.1)
    commhooks.LocalSGD(tau=2).register(model, optimizer)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (differing_shapes, ["parameter weight", "(3, 5)", "(3, 6)"]),
        (differing_dtypes, ["parameter 0.weight", "float32", "float64"]),
        (differing_strides, ["parameter 0.weight", "(5, 1)", "(1, 7)"]),
        (differing_order, ["parameter a", "parameter b"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_parameters_that_differ(make: Callable[[], nn.Module], words: Sequence[str]) -> None:
    for outcome in rank_outcomes(register_module, 2, make, timeout=30.0, group_timeout=600.0):
        assert isinstance(outcome.error, commhooks.RegistrationError), outcome.describe()
        assert all(word in str(outcome.error) for word in words), str(outcome.error)


def frozen_on_one_rank() -> None:
    """DDP is told of the layer on every rank; one freezes it before registering."""
    model = DistributedDataParallel(ragged_model())
    if dist.get_rank():
        model.module.get_submodule("0").requires_grad_(False)
    commhooks.LocalSGD(tau=2).register(model, SGD(model.parameters(), lr=0.1))


def one_rank_refuses() -> None:
    """Only rank 1's optimizer is foreign; rank 0 has no reason of its own to refuse."""
    model = DistributedDataParallel(ragged_model())
    owner = ragged_model() if dist.get_rank() else model
    commhooks.LocalSGD(tau=2).register(model, SGD(owner.parameters(), lr=0.1))


def another_number_of_optimizers() -> None:
    model = DistributedDataParallel(ragged_model())
    optimizers = [SGD(model.parameters(), lr=0.1) for _ in range(1 + dist.get_rank())]
    commhooks.LocalSGD(tau=2).register(model, *optimizers)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (frozen_on_one_rank, ["parameter 0.weight", "missing"]),
        (one_rank_refuses, ["owns none"]),
        (another_number_of_optimizers, ["optimizers", "1", "2"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_rank_does_not_refuse_alone(task: Callable[[], None], words: Sequence[str]) -> None:
    for outcome in rank_outcomes(task, 2, timeout=30.0, group_timeout=600.0):
        assert isinstance(outcome.error, commhooks.RegistrationError), outcome.describe()
        assert all(word in str(outcome.error) for word in words), str(outcome.error)
