"""Pins the bare form's registration at the first forward: buffers stay, checkpoints fit both."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.cases import Case
from tests.harness import run_ranks
from tests.training import Form, Trainer
from tests.workload import initialise


def normalised(dtype: torch.dtype) -> nn.Module:
    layers = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3, bias=False)
    return initialise(nn.Sequential(*layers)).to(dtype)


def everything(trainer: Trainer) -> list[Tensor]:
    """Parameters and buffers."""
    return [value.clone() for value in trainer.model.state_dict().values()]


def resume_everywhere(cases: Sequence[Case], before: Form, after: Form) -> None:
    for case in cases:
        whole = Trainer(case, before)
        seen = []
        for _ in range(case.steps):
            whole.step()
            seen.append(everything(whole))
        for step in (1, 3, 4):
            first = Trainer(case, before)
            for _ in range(step):
                first.step()
            again = Trainer(case, after)
            again.go_on(first.saved(), step)
            for later in range(step, case.steps):
                again.step()
                for mine, expected in zip(everything(again), seen[later], strict=True):
                    assert torch.equal(mine, expected), (str(case), step, later)


CASES = [
    Case("LocalSGD", {"tau": 2}, model=normalised, steps=6),
    Case("CoCoDSGD", {"tau": 2}, model=normalised, steps=6),
    Case("OverlapLocalSGD", {"tau": 2}, model=normalised, warmup_steps=2, steps=6),
    Case("AllReduce", model=normalised, steps=6),
]


@pytest.mark.parametrize(
    ("before", "after"), [("hook", "hook"), ("hook", "register"), ("register", "hook")]
)
def test_statistics_of_a_resumed_run(before: Form, after: Form) -> None:
    """DDP's first forward gave every rank the first rank's."""
    run_ranks(resume_everywhere, 2, CASES, before, after)


def usable_before_the_first_backward(case: Case) -> list[int]:
    """A forward is enough to register: what needs the state works from there on."""
    trainer = Trainer(case, "hook")
    trainer.model(torch.ones(4, 5))
    with trainer.state.averaged():
        pass
    assert trainer.state.state_dict()
    return [trainer.state.stats.step]


def test_the_bare_form_is_registered_by_the_first_forward() -> None:
    assert run_ranks(usable_before_the_first_backward, 2, CASES[0]) == [[0], [0]]
