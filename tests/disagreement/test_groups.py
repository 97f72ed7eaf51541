"""Pins registration where some ranks belong to more groups than others.

Torch counts the groups that a process belongs to, and a name made of that count differs then.
"""

from dataclasses import replace

import pytest
import torch.distributed as dist
from torch import Tensor

from tests.cases import Case, two_cases
from tests.expected import assert_follows, reference_trajectory
from tests.harness import run_ranks
from tests.training import Form, Trainer


def groups_before(case: Case, form: Form, among_members: bool) -> list[Tensor]:
    """A pipeline's embedding group, and a group of fewer ranks still, before the state."""
    if among_members:
        if dist.get_rank() != 1:
            dist.new_group([0, 2], use_local_synchronization=True)
    else:
        dist.new_group([0, 2])
        dist.new_group([2])
    trainer = Trainer(case, form)
    return [trainer.step() for _ in range(case.steps)]


@pytest.mark.parametrize(
    ("form", "among_members"), [("register", False), ("hook", False), ("register", True)]
)
def test_groups_of_some_ranks_before_registration(form: Form, among_members: bool) -> None:
    case = two_cases(steps=5)[0]
    ranks = run_ranks(groups_before, 3, case, form, among_members, timeout=20.0)
    assert_follows(case, ranks, reference_trajectory(case, 3))


def a_state_on_a_subgroup_first(case: Case) -> list[Tensor]:
    """Ranks 0 and 2 train a model of their own, and then one with rank 1, and both at once."""
    pair = dist.new_group([0, 2])
    first = None
    if dist.get_rank() != 1:
        first = Trainer(replace(case, ddp={"process_group": pair}))
        first.step()
    second = Trainer(case)
    steps = []
    for _ in range(case.steps):
        steps.append(second.step())
        if first is not None:
            first.step()
    if first is not None:
        first.state.finish()
    return steps


def test_a_state_on_a_subgroup_before_one_on_all_ranks() -> None:
    for case in two_cases(steps=5):
        ranks = run_ranks(a_state_on_a_subgroup_first, 3, case, timeout=20.0)
        assert_follows(case, ranks, reference_trajectory(case, 3))
