"""Pins `lr_factor`: with it the consensus moves as far as DDP's model, where gradients stay."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import commhooks
from tests.harness import run_ranks

LR, TAU = 0.01, 3

STATES: Sequence[Callable[[], commhooks.CommHookState]] = (
    partial(commhooks.AllReduce),
    partial(commhooks.LocalSGD, tau=TAU),
    partial(commhooks.OverlapLocalSGD, tau=TAU),
    partial(commhooks.OverlapLocalSGD, tau=TAU, beta=0.7),
    partial(commhooks.OverlapLocalSGD, tau=TAU, alpha=0.3, beta=0.5),
    partial(commhooks.EASGD, tau=TAU),
    partial(commhooks.EASGD, tau=TAU, alpha=0.2),
    partial(commhooks.CoCoDSGD, tau=TAU),
    partial(commhooks.BMUF, tau=TAU),
    partial(commhooks.BMUF, tau=TAU, eta=0.4, zeta=0.8),
)


def speeds(momentum: float) -> list[float]:
    """How far the consensus moves in a round, as a part of what DDP would, once it is steady."""
    found = []
    for make in STATES:
        state = make()
        lr = LR * state.lr_factor
        model = DistributedDataParallel(nn.Linear(3, 1, bias=False).double())
        optimizer = SGD(model.parameters(), lr=lr, momentum=momentum)
        state.register(model, optimizer)
        seen = []
        for step in range(1, 60 * TAU + 1):
            # The same gradient at every step, but not on every rank; their mean is 1.
            slope = torch.full((1, 3), 2.0 * (dist.get_rank() + 1) / (dist.get_world_size() + 1))
            torch.autograd.backward(model(slope.double()).sum())
            optimizer.step()
            optimizer.zero_grad()
            if step % TAU == 0:
                with state.averaged():
                    seen.append(model.module.weight.detach().mean().item())
        found.append((seen[-2] - seen[-1]) / (LR * TAU / (1 - momentum)))
    return found


@pytest.mark.parametrize("m", [1, 2, 3])
def test_consensus_is_as_fast_as_ddp(m: int) -> None:
    for found in run_ranks(speeds, m, 0.5):
        for make, speed in zip(STATES, found, strict=True):
            assert speed == pytest.approx(1.0, rel=1e-3), make


def factors(island: int | None) -> list[float]:
    """Before and after registration."""
    state = commhooks.EASGD(tau=2, island=island)
    before = state.lr_factor
    model = DistributedDataParallel(nn.Linear(2, 2))
    state.register(model, SGD(model.parameters(), lr=0.1))
    return [before, state.lr_factor]


def test_factor_counts_workers() -> None:
    assert run_ranks(factors, 4, None) == [[1.25, 1.25]] * 4
    assert run_ranks(factors, 4, 2) == [[1.5, 1.5]] * 4


def test_factor_before_there_is_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert commhooks.BMUF(tau=2).lr_factor == pytest.approx(1 / 8)
    assert commhooks.BMUF(tau=2, island="node").lr_factor == pytest.approx(1 / 2)
    assert commhooks.OverlapLocalSGD(tau=2, alpha=1.0).lr_factor == 1.0
