"""Pins that a state takes what Lightning Fabric's ``setup`` returns, the scaler with it."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD

import commhooks
from tests.cases import Case, two_cases
from tests.expected import assert_ranks_follow
from tests.frameworks import ready_for_frameworks
from tests.harness import preload, run_ranks
from tests.reference import flat
from tests.training import Form, make_state
from tests.workload import loss, plain_sgd, ragged_model, trained

preload("tests.framework_imports")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("lightning"), reason="needs the extra frameworks"),
]


def a_fabric(**options: Any) -> Any:
    ready_for_frameworks()
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy="ddp", **options)
    fabric.launch()
    return fabric


def train(cases: list[Case], form: Form, compiled: bool) -> list[list[Tensor]]:
    fabric = a_fabric()
    runs = []
    for case in cases:
        module = ragged_model()
        model, *optimizers = fabric.setup(module, *case.optimizers(module))
        if compiled:
            model = torch.compile(model, backend="eager")
        state = make_state(case)
        if form == "register":
            state.register(model, *optimizers)
        else:
            model._forward_module.register_comm_hook(state, commhooks.comm_hook)
        steps = []
        for step in range(1, case.steps + 1):
            fabric.backward(loss(model, dist.get_rank(), step))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            steps.append(flat(trained(module)).clone())
        state.finish()
        runs.append(steps)
    return runs


@pytest.mark.parametrize(
    ("form", "compiled"), [("register", False), ("register", True), ("hook", False)]
)
def test_what_setup_returns_is_registered(form: Form, compiled: bool) -> None:
    """The model was no DDP model, and nothing said what to pass."""
    cases = two_cases(optimizers=plain_sgd, steps=8)
    ranks = run_ranks(train, 2, cases, form, compiled, timeout=120.0)
    assert_ranks_follow(cases, ranks)


def scaled() -> list[tuple[int, int]]:
    """Steps and rounds where the scaler skips the step of a boundary, on one rank alone."""
    from lightning.fabric.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    fabric = a_fabric(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    module = ragged_model()
    model, optimizer = fabric.setup(module, SGD(module.parameters(), lr=0.05))
    state = commhooks.LocalSGD(tau=2)
    state.register(model, optimizer)
    seen = []
    for step in range(1, 7):
        value = loss(model, dist.get_rank(), step)
        fabric.backward(value * float("inf") if step == 2 and dist.get_rank() else value)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((state.stats.step, state.stats.rounds_launched))
    state.finish()
    return seen


def test_its_scaler_is_found() -> None:
    """A skipped step was a boundary that came with the next forward."""
    for seen in run_ranks(scaled, 2, timeout=120.0):
        assert seen == [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (6, 3)]
