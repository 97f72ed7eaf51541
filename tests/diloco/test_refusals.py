"""Pins what DiLoCo refuses by name, at construction or on every rank at registration."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import LBFGS, SGD, AdamW, Muon, Optimizer, SparseAdam

import commhooks
from tests.cases import Case
from tests.diloco.family import deep_model
from tests.expected import assert_follows, reference_trajectory
from tests.harness import run_ranks
from tests.reference import flat
from tests.training import Form, Trainer, attach, make_state, wrapped
from tests.workload import nesterov_sgd


def not_an_optimizer(parameters: list[Tensor]) -> object:
    return parameters


def without_arguments() -> Optimizer:
    return SGD([torch.zeros(1)], lr=1.0)


def name(value: object) -> str:
    """The same in every process, which a function's own text is not."""
    return "-".join(value) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delay": 4}, "delay must be at most tau, which is 3, got 4"),
        ({"delay": -1}, "delay must be an integer of at least 0"),
        ({"delay": 1.5}, "delay must be an integer"),
        ({"merge": "sum"}, "merge must be one of 'blend', 'carry', got 'sum'"),
        ({"merge": None}, "merge must be one of"),
        ({"alpha": 1.5}, r"alpha must be a real number in \[0, 1\]"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"fragments": 0}, "fragments must be an integer of at least 1"),
        ({"fragments": 2.0}, "fragments must be an integer"),
        ({"fragments": "0.*"}, "fragments must be"),
        ({"fragments": []}, "fragments must be"),
        ({"fragments": ["0.*", "2.*"]}, r"fragments\[0\] must be a sequence of strings"),
        ({"fragments": [["0.*"], []]}, r"fragments\[1\] must be at least one name"),
        ({"fragments": [["0.*"], [2]]}, r"fragments\[1\] must be a sequence of strings"),
        ({"outer": SGD([torch.zeros(1)], lr=1.0)}, "outer must be a function that builds"),
        ({"outer": "sgd"}, "outer must be a function that builds"),
        ({"outer": None}, "outer must be a function that builds"),
        ({"outer": partial(SGD, lr=-1.0)}, "outer must be a builder .*Invalid learning rate: -1.0"),
        ({"outer": without_arguments}, "outer must be a builder .*takes 0 positional arguments"),
        ({"outer": not_an_optimizer}, "outer must be a builder of a torch.optim.Optimizer"),
    ],
    ids=name,
)
def test_refused_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(commhooks.HyperParameterError, match=message):
        commhooks.DiLoCo(tau=3, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 1.0}, "beta must be"),
        ({"beta": -0.1}, "beta must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"lr": float("inf")}, "lr must be"),
    ],
    ids=name,
)
def test_slowmo_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(commhooks.HyperParameterError, match=message):
        commhooks.SlowMo(tau=3, **arguments)


# At registration. The model's parameters are 0.weight, 0.bias, 2.weight, ... 4.bias.

REFUSALS: Sequence[tuple[dict[str, Any], str]] = [
    ({"fragments": 7}, "The model has 6 parameters to average, fewer than the 7 fragments"),
    (
        {"fragments": [["0.*", "2.*"], ["4.*"], ["6.*"]]},
        r"fragments\[2\] names '6\.\*', which is no parameter that trains; there are '0\.weight'",
    ),
    ({"fragments": [["0.*", "nothing"], ["2.*", "4.*"]]}, r"fragments\[0\] names 'nothing'"),
    ({"fragments": [["0.*", "2.*"], ["2.bias", "4.*"]]}, "'2.bias' is in fragments 0 and 1"),
    ({"fragments": [["*"], ["*.weight"]]}, "is in fragments 0 and 1; name each once"),
    ({"fragments": [["0.*"], ["2.*"]]}, "No fragment names '4.weight', '4.bias'; every parameter"),
    (
        {"outer": partial(Muon, lr=0.1)},
        r"outer optimizer does not take these parameters .*0\.bias.*: Muon only supports 2D",
    ),
    (
        {"outer": partial(Muon, lr=0.1), "fragments": [["*.weight"], ["*.bias"]]},
        r"does not take these parameters \(0\.bias, 2\.bias, 4\.bias\)",
    ),
    ({"outer": LBFGS}, "outer optimizer does not take these parameters .*closure"),
    ({"outer": partial(SparseAdam, lr=0.1)}, "SparseAdam does not support dense gradients"),
    ({"outer": partial(AdamW, capturable=True)}, "If capturable=True, params"),
]


def refused(index: int, form: Form) -> str:
    """The same model and optimizer then train with other arguments, as if nothing had been."""
    arguments, message = REFUSALS[index]
    case = Case("DiLoCo", {"tau": 2, **arguments}, model=deep_model)
    model = wrapped(case.model(case.dtype))
    optimizers = nesterov_sgd(model)
    before = copy.deepcopy(list(model.parameters()))

    def first_step() -> None:
        attach(make_state(case), model, optimizers, form)
        case.backward(model, dist.get_rank(), 1)

    with pytest.raises(commhooks.RegistrationError, match=message) as caught:
        first_step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    if form == "register":
        attach(make_state(Case("DiLoCo", {"tau": 2, "fragments": 2})), model, optimizers)
        for step in range(1, 4):
            case.backward(model, dist.get_rank(), step)
            optimizers[0].step()
            optimizers[0].zero_grad()
        assert not torch.equal(flat(before), flat(model.parameters()))
    return str(caught.value)


def all_refused(form: Form) -> list[str]:
    return [refused(index, form) for index in range(len(REFUSALS))]


@pytest.mark.parametrize("form", ["register", "hook"])
def test_refused_on_every_rank_with_nothing_changed(form: Form) -> None:
    first, second = run_ranks(all_refused, 2, form, group_timeout=600.0)
    assert first == second


def disagreeing(arguments: Sequence[dict[str, Any]]) -> str:
    case = Case("DiLoCo", {"tau": 2, **arguments[dist.get_rank()]}, model=deep_model)
    with pytest.raises(commhooks.RegistrationError) as caught:
        Trainer(case)
    return str(caught.value)


DISAGREEMENTS: Sequence[tuple[Sequence[dict[str, Any]], str]] = [
    ([{"delay": 0}, {"delay": 1}], "delay"),
    ([{"fragments": 1}, {"fragments": 2}], "fragments"),
    ([{}, {"fragments": 7}], "7 fragments"),
    ([{"fragments": [["0.*"], ["2.*", "4.*"]]}, {"fragments": [["2.*", "4.*"], ["0.*"]]}], "fragm"),
    ([{"merge": "blend"}, {"merge": "carry"}], "merge"),
    ([{"outer": partial(SGD, lr=1.0)}, {"outer": partial(SGD, lr=0.5)}], "outer"),
]


def all_disagreements() -> list[str]:
    return [disagreeing(arguments) for arguments, _ in DISAGREEMENTS]


def test_ranks_that_disagree_are_told_where() -> None:
    ranks = run_ranks(all_disagreements, 2, group_timeout=600.0)
    for (arguments, name), *messages in zip(DISAGREEMENTS, *ranks, strict=True):
        assert all(name in message for message in messages), (arguments, messages)


def set_after_registration() -> None:
    trainer = Trainer(Case("DiLoCo", {"tau": 3, "fragments": 2, "delay": 1}, model=deep_model))
    trainer.step()
    for name, value in (
        ("tau", 2),
        ("delay", 0),
        ("merge", "carry"),
        ("alpha", 0.5),
        ("fragments", 1),
        ("outer", partial(SGD, lr=1.0)),
    ):
        with pytest.raises(commhooks.RegistrationError, match=f"{name} cannot be set"):
            setattr(trainer.state, name, value)


def test_what_is_registered_cannot_be_set() -> None:
    run_ranks(set_after_registration, 1)


def with_an_outer_learning_rate_of_its_own(setting: Callable[[], Case]) -> list[Tensor]:
    case = setting()
    trainer = Trainer(case)
    return [trainer.step() for _ in range(case.steps)]


def with_a_lambda() -> Case:
    """What cannot be pickled, and has no name that ranks could compare."""
    arguments = {"tau": 2, "outer": lambda parameters: SGD(parameters, lr=0.9)}
    return Case("DiLoCo", arguments, dtype=torch.float64, steps=7)


def test_any_function_builds_an_outer_optimizer() -> None:
    real = run_ranks(with_an_outer_learning_rate_of_its_own, 2, with_a_lambda)
    assert_follows(with_a_lambda(), real, reference_trajectory(with_a_lambda(), 2))
