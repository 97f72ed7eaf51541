"""Pins that an island whose ranks no longer hold the same parameters is found at its next round.

Its ranks make the same updates, so that nothing ever brings them together again.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import commhooks
from tests.cases import Case, one_case
from tests.harness import run_ranks
from tests.training import Trainer
from tests.workload import plain_sgd

Nudge = Callable[[nn.Module], None]


@torch.no_grad()
def by_one_bit(model: nn.Module) -> None:
    weight = model.get_parameter("2.weight")
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0, dtype=weight.dtype))


@torch.no_grad()
def by_its_sign(model: nn.Module) -> None:
    model.get_parameter("0.bias")[1].neg_()


@torch.no_grad()
def by_a_factor_of_two(model: nn.Module) -> None:
    """Which changes no bit but the exponent's, among the first of a number."""
    model.get_parameter("0.weight")[3, 1].mul_(2)


NUDGES: Sequence[Nudge] = (by_one_bit, by_its_sign, by_a_factor_of_two)


class Found(NamedTuple):
    """After which step it was found, what was said, and whether nothing was mixed in."""

    step: int
    said: str
    as_written: bool


def trained_apart(case: Case, nudge: Nudge, ranks: Sequence[int]) -> Found:
    """Trains on after some ranks have changed their model in the optimizer's step number 4."""
    trainer = Trainer(case)
    written: list[Tensor] = []

    def after_the_update(*_: object) -> None:
        if trainer.steps == 4 and trainer.rank in ranks:
            nudge(trainer.model.module)
        written.append(trainer.x)

    (optimizer,) = trainer.optimizers
    handle = optimizer.register_step_post_hook(after_the_update)
    hooks: Any = optimizer._optimizer_step_post_hooks
    hooks.move_to_end(handle.id, last=False)
    for step in range(1, 4 + 3 * case.tau):
        try:
            trainer.step()
        except commhooks.RoundError as error:
            with pytest.raises(commhooks.RoundError):
                trainer.state.finish()
            return Found(step, str(error), torch.equal(trainer.x, written[-1]))
    return Found(0, "nothing was raised", False)


def trained_apart_in(
    cases: Sequence[Case], nudges: Sequence[Nudge], ranks: Sequence[int]
) -> list[Found]:
    return [trained_apart(case, nudge, ranks) for case in cases for nudge in nudges]


FRAGMENTS = [["0.*"], ["2.*"]]
"""Launched after steps 2, 6, ... and 4, 8, ..."""

BLOCKING = Case("LocalSGD", {"tau": 2}, island=2, optimizers=plain_sgd)
CASES = [
    (BLOCKING, (4, 4, 4)),
    (one_case("SlowMo", 2, island=2), (4, 4, 4)),
    (Case("DiLoCo", {"tau": 4, "delay": 2}, island=2), (6, 6, 6)),
    (Case("DiLoCo", {"tau": 4, "fragments": FRAGMENTS, "delay": 3}, island=2), (7, 9, 9)),
    (one_case("OverlapLocalSGD", 2, island=2), (6, 6, 6)),
    (one_case("CoCoDSGD", 2, island=2), (6, 6, 6)),
]
"""With the steps at which the round lands that is the first to be launched after each nudge."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_rank_that_differs_is_found_on_all(dtype: torch.dtype) -> None:
    todo = [replace(case, dtype=dtype) for case, _ in CASES]
    real = run_ranks(trained_apart_in, 4, todo, NUDGES, [2])
    each = [
        (f"{case} {nudge.__name__}", step)
        for case, steps in CASES
        for nudge, step in zip(NUDGES, steps, strict=True)
    ]
    for (where, step), *ranks in zip(each, *real, strict=True):
        for found in ranks:
            assert found.step == step, f"{where}: {found}"
            assert "the parameters of ranks [2, 3] are no longer the same bit for bit" in found.said
            assert found.as_written, where


def test_the_odd_one_out_of_three_is_named() -> None:
    case = replace(BLOCKING, island=3)
    for (found,) in run_ranks(trained_apart_in, 6, [case], [by_one_bit], [4]):
        assert found.step == 4
        assert (
            "the parameters of rank(s) [4] and of the rest of their island, [3, 5]," in found.said
        )
        assert found.as_written


def by_a_draw_of_its_own(model: nn.Module) -> None:
    """As a layer does that starts anew in mid-run, with the random numbers of its rank."""
    torch.manual_seed(dist.get_rank())
    layer = model.get_submodule("0")
    assert isinstance(layer, nn.Linear)
    layer.reset_parameters()


def test_all_islands_that_fell_apart_are_named() -> None:
    todo = [case for case, _ in CASES[:1]]
    for (found,) in run_ranks(trained_apart_in, 4, todo, [by_a_draw_of_its_own], range(4)):
        assert found.step == 4
        assert "the parameters of ranks [0, 1] and ranks [2, 3] are no longer" in found.said
        assert "no layer that draws its own random weights" in found.said
        assert found.as_written


def test_ranks_that_are_workers_may_differ() -> None:
    todo = [replace(case, island=1) for case, _ in CASES]
    for runs in run_ranks(trained_apart_in, 2, todo, [by_its_sign], [1]):
        assert [found.said for found in runs] == ["nothing was raised"] * len(todo)
