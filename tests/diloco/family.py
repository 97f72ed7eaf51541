"""Models, outer optimizers and cases that the tests of DiLoCo share."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from tests.cases import Case
from tests.workload import initialise

Outer = Callable[[list[Tensor]], Optimizer]

PLAIN = partial(SGD, lr=0.8)
HEAVY_BALL = partial(SGD, lr=0.6, momentum=0.7)
NESTEROV = partial(SGD, lr=0.7, momentum=0.9, nesterov=True)
ADAMW = partial(AdamW, lr=0.02, weight_decay=1e-2)
ADAFACTOR = partial(Adafactor, lr=0.02)
"""Not elementwise: it factorises the second moments of a matrix, in the matrix's own shape."""

OUTERS: Sequence[Outer] = (PLAIN, HEAVY_BALL, NESTEROV, ADAMW, ADAFACTOR)

MERGES: Sequence[dict[str, Any]] = ({}, {"alpha": 0.3}, {"merge": "carry"})


def deep_model(dtype: torch.dtype) -> nn.Module:
    """Six parameters of ragged sizes: 30 + 6 + 42 + 7 + 21 + 3 numbers."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    return initialise(model).to(dtype)


def streaming(**settings: Any) -> list[Case]:
    """Several fragments in flight at once, of every kind of merge, in fp64."""
    settings = {"model": deep_model, "dtype": torch.float64, "steps": 14, **settings}
    return [
        Case("DiLoCo", arguments, **settings)
        for arguments in (
            {"tau": 4, "fragments": 2, "delay": 3, "outer": NESTEROV, "alpha": 0.5},
            {"tau": 3, "fragments": 3, "delay": 3, "outer": ADAMW, "merge": "carry"},
            {"tau": 5, "fragments": 5, "delay": 2, "outer": ADAFACTOR},
        )
    ]


def of_tau_four(
    chosen: Iterable[tuple[Outer, dict[str, Any]]],
    times: Iterable[tuple[int, int]],
    **settings: Any,
) -> list[Case]:
    """Each pair of an outer optimizer and a merge with each number of fragments and delay."""
    settings = {"model": deep_model, "dtype": torch.float64, "steps": 14, **settings}
    return [
        Case(
            "DiLoCo",
            {"tau": 4, "fragments": fragments, "delay": delay, "outer": outer, **merge},
            **settings,
        )
        for (outer, merge), (fragments, delay) in itertools.product(chosen, times)
    ]


def in_flight(**settings: Any) -> list[Case]:
    """A round that lands at the next launch, and two that overlap and carry on."""
    carried = {"tau": 4, "fragments": 2, "delay": 3, "merge": "carry", "outer": HEAVY_BALL}
    return [
        Case("OverlapLocalSGD", {"tau": 3, "beta": 0.5}, steps=10, **settings),
        Case("DiLoCo", carried, steps=10, **settings),
    ]
