"""Pins what algorithms are special cases of others, over real processes, to 1e-12 in fp64."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from tests.cases import Case
from tests.harness import run_ranks
from tests.test_laws import gap
from tests.training import trajectories
from tests.workload import Backward, adamw, gradient, nesterov_sgd, plain_sgd

TAU = 3


def from_the_second_boundary_on(model: nn.Module, rank: int, step: int) -> None:
    """No gradient before the first boundary, so that the models still are where they started."""
    gradient(model, rank, step)
    if step <= TAU:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)


def diloco(outer: Mapping[str, Any], **arguments: Any) -> tuple[str, dict[str, Any]]:
    return "DiLoCo", {"outer": partial(SGD, **outer), **arguments}


IDENTITIES: list[tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]], Backward]] = [
    (
        ("BMUF", {"eta": 0.6, "zeta": 0.8, "nesterov": True}),
        diloco({"lr": 0.8, "momentum": 0.6, "nesterov": True}),
        gradient,
    ),
    (
        ("BMUF", {"eta": 0.6, "zeta": 0.8}),
        diloco({"lr": 0.8, "momentum": 0.6}),
        gradient,
    ),
    (
        ("OverlapLocalSGD", {"alpha": 0.6, "beta": 0.7}),
        diloco({"lr": 1.0, "momentum": 0.7}, delay=TAU, alpha=0.4),
        from_the_second_boundary_on,
    ),
    (
        ("OverlapLocalSGD", {"alpha": 0.3}),
        diloco({"lr": 1.0}, delay=TAU, alpha=0.7),
        from_the_second_boundary_on,
    ),
    (("CoCoDSGD", {}), diloco({"lr": 1.0}, delay=TAU, merge="carry"), gradient),
    (("SlowMo", {"beta": 0.7, "lr": 0.9}), diloco({"lr": 0.9, "momentum": 0.7}), gradient),
    (("LocalSGD", {}), diloco({"lr": 1.0}), gradient),
    (("LocalSGD", {}), ("SlowMo", {"beta": 0.0}), gradient),
]


def test_identities() -> None:
    pairs = []
    for one, other, backward in IDENTITIES:
        # What weight decay does before the first boundary would tell the two apart there.
        late = backward is from_the_second_boundary_on
        for optimizers in (plain_sgd,) if late else (nesterov_sgd, adamw):
            for warmup_steps in (0,) if late else (0, 2):
                pairs += [
                    Case(
                        name,
                        {"tau": TAU, **arguments},
                        warmup_steps,
                        optimizers,
                        torch.float64,
                        steps=5 * TAU + 1,
                        backward=backward,
                    )
                    for name, arguments in (one, other)
                ]
    runs = [list(ranks) for ranks in zip(*run_ranks(trajectories, 3, pairs), strict=True)]
    for case, first, second in zip(pairs[::2], runs[::2], runs[1::2], strict=True):
        assert gap(first, second) < 1e-12, str(case)


def test_an_overlapped_pull_differs_at_the_first_boundary() -> None:
    """It draws to the start, where DiLoCo has nothing to use yet; else the law would say more."""
    arguments = {"tau": TAU, "outer": partial(SGD, lr=1.0), "delay": TAU, "alpha": 0.7}
    pair = [
        Case("OverlapLocalSGD", {"tau": TAU, "alpha": 0.3}, steps=TAU),
        Case("DiLoCo", arguments, steps=TAU),
    ]
    for overlapped, delayed in run_ranks(trajectories, 2, pair):
        assert torch.equal(overlapped[TAU - 2], delayed[TAU - 2])
        assert not torch.allclose(overlapped[TAU - 1], delayed[TAU - 1])
