"""Pins which parameter is in which fragment, by what is drawn together at a boundary."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from commhooks.engine.vectors.fragments import partition
from tests.cases import Case
from tests.diloco.family import HEAVY_BALL, deep_model
from tests.expected import assert_ranks_follow
from tests.harness import run_ranks
from tests.reference.diloco import deal
from tests.training import Trainer, trajectories
from tests.workload import initialise, plain_sgd, seeded

BY_NAME: Sequence[Any] = [
    [["*"]],
    [["0.weight", "0.bias"], ["2.weight", "2.bias"], ["4.weight", "4.bias"]],
    [["*.bias"], ["*.weight"]],
    [["4.*", "0.*"], ["2.*"]],
    [["[02].weight", "4.bias"], ["4.weight", "[!4].bias"]],
]


def test_fragments_by_name_follow_the_equations() -> None:
    todo = [
        Case(
            "DiLoCo",
            {"tau": 4, "fragments": fragments, "delay": 3, "outer": HEAVY_BALL, "alpha": 0.2},
            dtype=torch.float64,
            model=deep_model,
            steps=14,
        )
        for fragments in BY_NAME
    ]
    assert_ranks_follow(todo, run_ranks(trajectories, 2, todo))


def test_the_partition_is_the_documented_one() -> None:
    """The rule is part of the trajectory, so it is written once more in the reference."""
    generator = seeded(5)
    for count in range(1, 9):
        for _ in range(20):
            sizes = torch.randint(1, 50, (count + 4,), generator=generator).tolist()
            named = {f"p{number}": torch.zeros(size) for number, size in enumerate(sizes)}
            assert [list(part) for part in partition(named, count)] == deal(named, count)


def test_fragments_are_near_in_size() -> None:
    """No two differ by more than the largest parameter."""
    named = {f"p{n}": torch.zeros(1 + n * 7 % 23) for n in range(40)}
    sizes = [sum(p.numel() for p in part.values()) for part in partition(named, 6)]
    assert max(sizes) - min(sizes) <= max(p.numel() for p in named.values())


def drawn_together(case: Case) -> list[list[str]]:
    """The names whose parameters changed by more than their optimizer's step, after every step."""
    trainer = Trainer(case)
    seen = []
    for _ in range(case.steps):
        before = {n: p.detach().clone() for n, p in trainer.model.module.named_parameters()}
        trainer.step()
        after = dict(trainer.model.module.named_parameters())
        seen.append([n for n, p in after.items() if not torch.equal(p, before[n])])
    return seen


def no_gradient(model: nn.Module, rank: int, step: int) -> None:
    """Zero; but the first one pushes the ranks apart, once and for all parameters."""
    torch.autograd.backward(model(torch.ones(1, 5)).sum() * 0)
    if step == 1:
        for p in model.parameters():
            p.grad = torch.full_like(p, float(rank + 1))


def test_fragments_take_turns() -> None:
    """Every one is drawn right after its own steps, ceil(p tau / P) + k tau, and at no others."""
    case = Case(
        "DiLoCo",
        {"tau": 5, "fragments": 3},
        optimizers=plain_sgd,
        model=deep_model,
        backward=no_gradient,
        steps=12,
    )
    named = dict(deep_model(torch.float32).named_parameters())
    first, second, third = (sorted(names) for names in deal(named, 3))
    for seen in run_ranks(drawn_together, 2, case):
        # Nesterov's momentum keeps the global model moving, so every later landing shows too.
        assert [sorted(names) for names in seen] == [
            *(sorted(named), first, [], second, third),
            *([], first, [], second, third),
            *([], first),
        ]


class WithAnEmptyOne(nn.Module):
    """A parameter of no numbers at all, as for a feature that is switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.off = nn.Parameter(torch.zeros(0, 4))
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))) + self.off.sum()  # type: ignore[no-any-return]


def with_an_empty_one(dtype: torch.dtype) -> nn.Module:
    return initialise(WithAnEmptyOne()).to(dtype)


def test_a_parameter_without_numbers_is_in_no_fragment() -> None:
    todo = [
        Case(
            "DiLoCo",
            {"tau": 4, "fragments": fragments, "outer": HEAVY_BALL, "delay": 2},
            dtype=torch.float64,
            model=with_an_empty_one,
        )
        for fragments in (1, 2, 4, [["first.*"], ["last.*"]])
    ]
    assert_ranks_follow(todo, run_ranks(trajectories, 2, todo))
