"""Ranks of an island that run out of batches, within torch's Join."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join

import commhooks
from tests.cases import PERIODIC, Case, of_every_algorithm
from tests.expected import assert_close, reference_workers
from tests.harness import run_ranks
from tests.training import Form, Trainer
from tests.workload import adamw, weights_and_biases
from tests.works_with.test_amp import ScaledTrainer

Lengths = Sequence[int]
"""Every rank's number of batches in an epoch."""


def epochs(
    cases: Sequence[Case], lengths: Sequence[Lengths], form: Form = "register"
) -> list[list[Tensor]]:
    """The parameters after every epoch, each within a context of its own."""
    ends: list[list[Tensor]] = []
    for case in cases:
        trainer = Trainer(case, form)
        with torch.no_grad():
            # The bare form registers here, and Join needs a state that is registered.
            trainer.model(torch.zeros(1, 5, dtype=case.dtype))
        ends.append([])
        begun = 0
        for epoch in lengths:
            trainer.steps = begun
            with Join([trainer.state, trainer.model]):
                for _ in range(epoch[trainer.rank]):
                    trainer.step()
            begun += max(epoch)
            ends[-1].append(trainer.x)
    return ends


def expected(case: Case, lengths: Sequence[Lengths]) -> list[Tensor]:
    """An island goes on while a rank of it has batches; those that have none add zeros."""
    ranks = len(lengths[0])
    workers = reference_workers(case, ranks)
    ends, begun = [], 0
    for epoch in lengths:

        def backward(model: nn.Module, worker: int, step: int) -> None:
            for rank in range(worker * case.island, (worker + 1) * case.island):
                if step - begun <= epoch[rank]:  # noqa: B023 - called within this turn of the loop
                    case.backward(model, rank, step)
            for p in model.parameters():
                if p.grad is not None:
                    p.grad /= case.island

        longest = max(epoch)
        islands = [epoch[first : first + case.island] for first in range(0, ranks, case.island)]
        skipped = {
            (worker, begun + step)
            for worker, island in enumerate(islands)
            for step in range(max(island) + 1, longest + 1)
        }
        for _ in range(longest):
            workers.step(backward, skipped)
        ends.append(workers.finish())
        begun += longest
    return ends


def assert_all_follow(
    cases: Sequence[Case], lengths: Sequence[Lengths], form: Form = "register"
) -> None:
    ranks = len(lengths[0])
    for case, *real in zip(cases, *run_ranks(epochs, ranks, cases, lengths, form), strict=True):
        for epoch, model in enumerate(expected(case, lengths)):
            for ends in real:
                assert torch.equal(ends[epoch], real[0][epoch])
                assert_close(case, ends[epoch], model, f"epoch {epoch}")


CASES = [
    *of_every_algorithm([(1, 0), (3, 0)], PERIODIC, island=2),
    # Blocks of int8 would lie elsewhere in a share than in the whole.
    Case("OverlapLocalSGD", {"tau": 2}, island=2, compression="bf16"),
    Case("DiLoCo", {"tau": 2}, island=2, compression="bf16"),
    Case("EASGD", {"tau": 2}, island=2, optimizers=adamw),
    Case("LocalSGD", {"tau": 2}, island=2, optimizers=weights_and_biases, dtype=torch.float64),
]


# The optimizers have momentum, so that a second epoch shows whether their states are the same.
@pytest.mark.parametrize(
    "lengths",
    [
        [(5, 3, 4, 4), (4, 4, 4, 4)],
        [(2, 6, 6, 1), (1, 3, 2, 3)],
        [(0, 4, 7, 0), (3, 3, 0, 5)],
        [(2, 2, 7, 7), (6, 1, 1, 1)],
    ],
)
def test_an_island_goes_on_without_those_that_are_done(lengths: Sequence[Lengths]) -> None:
    assert_all_follow(CASES, lengths)


def test_batches_run_out_in_warm_up() -> None:
    """Its last steps are made without some, who start the local ones where the others are."""
    cases = [
        Case(name, {"tau": 2, **arguments}, 4, island=2)
        for name, arguments in (
            ("LocalSGD", {}),
            ("OverlapLocalSGD", {"beta": 0.7}),
            ("DiLoCo", {"delay": 1, "merge": "carry"}),
        )
    ]
    assert_all_follow(cases, [(2, 9, 7, 3), (3, 3, 1, 2)])


class GrowingFast(ScaledTrainer):
    growth_interval = 2


def scales() -> list[float]:
    """log2 of the scale after each of two epochs; in the first it grows after a rank has left."""
    trainer = GrowingFast(Case("LocalSGD", {"tau": 2}, island=2), True, ())
    seen = []
    for lengths in ((5, 3, 4, 5), (3, 3, 3, 3)):
        with Join([trainer.state, trainer.model]):
            for _ in range(lengths[trainer.rank]):
                trainer.step()
        seen.append(math.log2(trainer.scaler.get_scale()))
    return seen


def test_the_scaler_goes_on_with_those_that_train() -> None:
    assert run_ranks(scales, 4) == [[12.0, 14.0]] * 4


def test_islands_of_three() -> None:
    cases = [
        Case("OverlapLocalSGD", {"tau": 2, "alpha": 0.5, "beta": 0.7}, island=3),
        Case("DiLoCo", {"tau": 3, "delay": 2, "fragments": 2, "merge": "carry"}, island=3),
    ]
    assert_all_follow(cases, [(5, 1, 3, 2, 6, 4), (3, 3, 3, 1, 1, 4)])


def test_the_bare_form() -> None:
    """A rank without batches in the first epoch has optimizers that the state has never seen."""
    cases = [Case("LocalSGD", {"tau": 2}, island=2), Case("OverlapLocalSGD", {"tau": 2}, island=2)]
    assert_all_follow(cases, [(5, 0, 1, 4), (2, 2, 3, 2)], "hook")


def unused(case: Case) -> str:
    """The refusal, after which training goes on."""
    trainer = Trainer(case)
    trainer.step()
    with pytest.raises(commhooks.RegistrationError) as caught:
        Join([trainer.state, trainer.model])
    trainer.step()
    trainer.state.finish()
    return str(caught.value)


def test_unused_parameters_are_refused() -> None:
    case = Case("LocalSGD", {"tau": 2}, island=2, ddp={"find_unused_parameters": True})
    for message in run_ranks(unused, 4, case):
        assert "find_unused_parameters" in message
        assert "every forward use all parameters" in message
