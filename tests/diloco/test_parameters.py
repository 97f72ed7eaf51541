"""Pins outer optimizers and fragments on parameters of every kind, each seen in its own shape."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Muon

from tests.cases import Case
from tests.diloco.family import ADAFACTOR, ADAMW, HEAVY_BALL, NESTEROV, OUTERS
from tests.expected import assert_ranks_follow
from tests.harness import run_ranks
from tests.training import Form, trajectories
from tests.workload import Backward, MakeModel, gradient, initialise, plain_sgd, seeded
from tests.works_with.test_parameters import (
    channels_last,
    image_gradient,
    mixed_model,
    scaled_down,
    tied_model,
)


class Complex(nn.Module):
    """The absolute values of a product with a complex matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.zeros(4, 3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.turn.dtype) @ self.turn).abs()


def complex_model(dtype: torch.dtype) -> nn.Module:
    """In fp64, whatever the dtype; ``module.to`` would take the imaginary parts away."""
    model = initialise(nn.Sequential(nn.Linear(5, 4), Complex(), nn.Linear(3, 3)))
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            twice = torch.complex128 if p.is_complex() else torch.float64
            setattr(module, name, nn.Parameter(p.detach().to(twice)))
    return model


def transposed(dtype: torch.dtype) -> nn.Module:
    """Matrices that lie in memory column by column."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    initialise(model).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().T.contiguous().T)
    return model


def cases(
    model: MakeModel, backward: Backward = gradient, dtype: torch.dtype = torch.float64
) -> list[Case]:
    arguments: Sequence[tuple[str, dict[str, object]]] = (
        ("DiLoCo", {"tau": 2, "fragments": 2, "delay": 1, "outer": HEAVY_BALL, "alpha": 0.3}),
        ("DiLoCo", {"tau": 3, "fragments": 2, "delay": 3, "outer": NESTEROV, "merge": "carry"}),
        ("SlowMo", {"tau": 2, "beta": 0.6, "lr": 0.9}),
    )
    if dtype == torch.float64:
        arguments = (
            *arguments,
            ("DiLoCo", {"tau": 2, "fragments": 3, "outer": ADAMW}),
            ("DiLoCo", {"tau": 2, "fragments": 2, "delay": 1, "outer": ADAFACTOR}),
        )
    return [
        Case(name, each, optimizers=plain_sgd, dtype=dtype, model=model, backward=backward, steps=9)
        for name, each in arguments
    ]


@pytest.mark.parametrize("form", ["register", "hook"])
def test_parameters_of_every_kind(form: Form) -> None:
    todo = [
        *cases(complex_model),
        *cases(tied_model),
        *cases(transposed),
        *cases(channels_last, image_gradient),
        *cases(mixed_model, dtype=torch.float32),
        *cases(scaled_down, dtype=torch.float32),  # one of 400,000 numbers, one of 3
    ]
    assert_ranks_follow(todo, run_ranks(trajectories, 2, todo, form))


def test_three_ranks_with_parameters_of_every_kind() -> None:
    todo = [*cases(mixed_model, dtype=torch.float32), *cases(complex_model)]
    assert_ranks_follow(todo, run_ranks(trajectories, 3, todo))


def matrices_alone(dtype: torch.dtype) -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False))
    return initialise(model).to(dtype)


def test_muon_outside() -> None:
    """It makes a matrix's update orthogonal, so the matrix must be seen whole."""
    todo = [
        Case(
            "DiLoCo",
            {"tau": 2, "fragments": fragments, "delay": 1, "outer": partial(Muon, lr=0.05)},
            dtype=torch.float64,
            model=matrices_alone,
        )
        for fragments in (1, 2)
    ]
    assert_ranks_follow(todo, run_ranks(trajectories, 2, todo))


def bfloat16_gradient(model: nn.Module, rank: int, step: int) -> None:
    x = torch.randn(4, 5, generator=seeded(rank + 1, step)).bfloat16()
    torch.autograd.backward(model(x).square().mean())


def test_an_fp32_global_model_of_bf16_parameters() -> None:
    """Outer steps that bf16 cannot resolve add up."""
    todo = [
        Case(
            "DiLoCo",
            {"tau": 1, "outer": outer, "delay": delay},
            optimizers=plain_sgd,
            dtype=torch.bfloat16,
            backward=bfloat16_gradient,
        )
        for outer in OUTERS[:3]
        for delay in (0, 1)
    ]
    assert_ranks_follow(todo, run_ranks(trajectories, 2, todo))
