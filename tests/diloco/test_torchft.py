"""Pins the reference and the library to trajectories that torchft has published, exactly."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from tests import golden
from tests.cases import Case
from tests.expected import reference_trajectory
from tests.golden import unit_sgd
from tests.harness import run_ranks
from tests.training import trajectories

RUNS: Mapping[str, Sequence[Sequence[float]]] = json.loads(
    (Path(golden.__file__).parent / "torchft_streaming.json").read_text()
)["parameters after k = 0, 1, ... steps, [fragment 0, fragment 1], by alpha"]


class TwoNumbers(nn.Module):
    """Two layers of one number each, whose gradients are always 2."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1, 1, bias=False)
        self.second = nn.Linear(1, 1, bias=False)
        for p in self.parameters():
            nn.init.ones_(p)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * (self.first(x) + self.second(x))  # type: ignore[no-any-return]


def two_numbers(dtype: torch.dtype) -> nn.Module:
    return TwoNumbers().to(dtype)


def gradient_of_two(model: nn.Module, rank: int, step: int) -> None:
    torch.autograd.backward(model(torch.ones(1, 1)).sum())


def case(alpha: str, fragments: object) -> Case:
    arguments: dict[str, Any] = {
        "tau": 6,
        "outer": partial(SGD, lr=2.0),
        "fragments": fragments,
        "alpha": float(alpha),
    }
    return Case(
        "DiLoCo",
        arguments,
        optimizers=unit_sgd,
        model=two_numbers,
        backward=gradient_of_two,
        steps=len(RUNS[alpha]) - 1,
    )


CASES = [case(alpha, fragments) for alpha in RUNS for fragments in (2, [["first.*"], ["second.*"]])]


def published(case: Case) -> Sequence[Sequence[float]]:
    return RUNS[str(case.arguments["alpha"])][1:]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_torchfts(case: Case) -> None:
    for steps in zip(*reference_trajectory(case, size=2), strict=True):
        assert [x.tolist() for x in steps] == published(case)


def test_the_library_is_torchfts() -> None:
    for runs in run_ranks(trajectories, 2, CASES):
        for case, steps in zip(CASES, runs, strict=True):
            assert [x.tolist() for x in steps] == published(case), str(case)
