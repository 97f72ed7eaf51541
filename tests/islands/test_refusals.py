"""Pins which islands are refused, on every rank and with nothing changed, and which are not."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import commhooks
from tests.cases import Case, two_cases
from tests.expected import assert_close, assert_follows, reference_trajectory, reference_workers
from tests.harness import run_ranks
from tests.training import Trainer, make_state, wrapped
from tests.workload import gradient

Say = Callable[[], Any]
"""What this rank says of islands."""


@pytest.mark.parametrize("value", [0, -1, "machine", "Node", "", 1.5, 2.0, True, False, [0, 1]])
def test_a_wrong_value_is_named_with_what_it_must_be(value: object) -> None:
    with pytest.raises(commhooks.HyperParameterError, match='island must be "node"') as caught:
        commhooks.LocalSGD(tau=2, island=value)  # type: ignore[arg-type]
    assert repr(value) in str(caught.value)


def local(size: object, rank: object) -> Any:
    """On ``"node"``, with what a launcher would have put into the environment."""
    for name, value in (("LOCAL_WORLD_SIZE", size), ("LOCAL_RANK", rank)):
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = str(value)
    return "node"


def groups(*islands: Sequence[int]) -> list[dist.ProcessGroup]:
    """All of them, built on every rank as torch wants it."""
    return [dist.new_group(list(island)) for island in islands]


def mine(*islands: Sequence[int]) -> dist.ProcessGroup:
    made = groups(*islands)
    return next(g for g, i in zip(made, islands, strict=True) if dist.get_rank() in i)


def no_launcher() -> Any:
    return local(None, None)


def no_launcher_on_one_rank() -> Any:
    return local(None if dist.get_rank() == 2 else 2, dist.get_rank() % 2)


def local_rank_missing() -> Any:
    return local(2, None)


def not_a_number() -> Any:
    return local("two", dist.get_rank() % 2)


def local_rank_too_large() -> Any:
    return local(2, 2 + dist.get_rank() % 2)


def machines_of_none() -> Any:
    return local(0, 0)


def machines_of_three() -> Any:
    return local(3, dist.get_rank() % 3)


def machines_that_overlap() -> Any:
    """Every rank says that it is the first of its machine."""
    return local(2, 0)


def a_local_rank_before_the_first() -> Any:
    return local(2, 1)


def ranks_dealt_out_to_machines() -> Any:
    return local(2, dist.get_rank() // 2)


def three_of_four() -> Any:
    return 3


def more_than_there_are() -> Any:
    return 8


def another_number_on_one_rank() -> Any:
    return 4 if dist.get_rank() == 3 else 2


def none_on_one_rank() -> Any:
    return None if dist.get_rank() == 1 else 2


def unequal_groups() -> Any:
    return mine([0], [1, 2, 3])


def one_rank_has_the_wrong_group() -> Any:
    made = groups([0, 1], [2, 3], [0, 2])
    return made[2] if dist.get_rank() == 0 else made[dist.get_rank() // 2]


REFUSALS: list[tuple[Say, str]] = [
    (no_launcher, "needs LOCAL_WORLD_SIZE in the environment.*found ''.*island=8"),
    (no_launcher_on_one_rank, "needs LOCAL_WORLD_SIZE"),
    (local_rank_missing, "needs LOCAL_RANK"),
    (not_a_number, "found 'two'"),
    (local_rank_too_large, "LOCAL_RANK=[23] and LOCAL_WORLD_SIZE=2"),
    (machines_of_none, "LOCAL_RANK=0 and LOCAL_WORLD_SIZE=0"),
    (machines_of_three, "makes islands of 3 ranks, which does not divide the 4"),
    (machines_that_overlap, "LOCAL_RANK=0 on rank 3|disagree on their islands"),
    (a_local_rank_before_the_first, "LOCAL_RANK=1 on rank 0"),
    (ranks_dealt_out_to_machines, "give every rank its island as a process group|disagree on"),
    (three_of_four, "island=3 makes islands of 3 ranks, which does not divide the 4"),
    (more_than_there_are, "island=8 makes islands of 8 ranks"),
    (another_number_on_one_rank, "ranks in an island: 2 on rank 0, 4 on rank 3"),
    (none_on_one_rank, "ranks in an island: 2 on rank 0, 1 on rank 1"),
    (unequal_groups, "ranks in an island: 1 on rank 0, 3 on rank 1"),
    (one_rank_has_the_wrong_group, r"rank 0 says \[0, 2\], rank 2 says \[2, 3\]"),
]


def refused(sayings: Sequence[Say]) -> list[tuple[str, bool]]:
    """What each says, and whether a good state registers on the same model and trains."""
    ends = []
    for say in sayings:
        case = Case("LocalSGD", {"tau": 2}, island=2, steps=3)
        model = wrapped(case.model(case.dtype))
        optimizers = case.optimizers(model)
        before = model.state_dict()
        island = say()
        message = "nothing was raised"
        try:
            make_state(case, island=island).register(model, *optimizers)
        except commhooks.RegistrationError as error:
            message = str(error)
        unchanged = model.forward_sync_buffers and all(
            torch.equal(before[name], value) for name, value in model.state_dict().items()
        )
        state = make_state(case)
        state.register(model, *optimizers)
        for step in (1, 2, 3):
            gradient(model, dist.get_rank(), step)
            optimizers[0].step()
            optimizers[0].zero_grad()
        state.finish()
        ends.append((message, unchanged and state.stats.rounds_completed == 1))
    return ends


def test_islands_that_cannot_be_are_refused_on_every_rank() -> None:
    """With a group timeout of ten minutes, so that a rank that waited would be found stuck."""
    ends = run_ranks(refused, 4, [say for say, _ in REFUSALS], group_timeout=600.0)
    for (say, words), *ranks in zip(REFUSALS, *ends, strict=True):
        for message, good in ranks:
            with pytest.raises(commhooks.RegistrationError, match=words):
                raise commhooks.RegistrationError(message)
            assert good, say.__name__


def beyond_the_model(case: Case) -> str:
    """The model trains on two ranks, and the island holds another; then on its own two."""
    model_on = mine([0, 1], [2, 3])
    model = wrapped(case.model(case.dtype), process_group=model_on)
    optimizers = case.optimizers(model)
    with pytest.raises(commhooks.RegistrationError) as caught:
        make_state(case, island=mine([0, 2], [1, 3])).register(model, *optimizers)
    make_state(case, island=model_on).register(model, *optimizers)
    return str(caught.value)


def test_an_island_holds_no_rank_that_does_not_train_the_model() -> None:
    for message in run_ranks(beyond_the_model, 4, Case("LocalSGD", {"tau": 2})):
        assert "must hold this rank" in message
        assert "none that does not train this model" in message


@pytest.mark.parametrize("alone", [True, False])
def test_a_group_without_this_rank_cannot_be_given(alone: bool) -> None:
    """torch gives a rank that is not in a new group something that is none."""
    for message in run_ranks(outsider, 2, alone):
        assert message.startswith('island must be "node"') == alone
        assert ("this rank is not a member of the group" in message) == alone


def outsider(alone: bool) -> str:
    both = groups([0], [1])
    try:
        commhooks.LocalSGD(tau=2, island=both[(dist.get_rank() + alone) % 2])
    except commhooks.HyperParameterError as error:
        return str(error)
    return ""


def of_one_machine() -> Any:
    return local(2, dist.get_rank() % 2)


def all_on_one_machine() -> Any:
    return local(4, dist.get_rank())


def own_groups() -> Any:
    return mine([0, 1], [2, 3])


def interleaved_groups() -> Any:
    return mine([0, 2], [1, 3])


def reversed_groups() -> Any:
    return mine([3, 1], [0, 2])


def trajectory(case: Case, say: Say) -> list[Tensor]:
    trainer = Trainer(case, island=say())
    steps = [trainer.step() for _ in range(case.steps)]
    trainer.state.finish()
    return [*steps, trainer.x]


def trajectories(cases: Sequence[Case], sayings: Sequence[Say]) -> list[list[Tensor]]:
    return [trajectory(case, say) for say in sayings for case in cases]


WORKING: list[tuple[Say, int, Sequence[int]]] = [
    (of_one_machine, 2, [0, 1, 2, 3]),
    (all_on_one_machine, 4, [0, 1, 2, 3]),
    (own_groups, 2, [0, 1, 2, 3]),
    (interleaved_groups, 2, [0, 2, 1, 3]),
    (reversed_groups, 2, [0, 2, 1, 3]),
]
"""With the size of an island, and the ranks island by island."""


def test_islands_of_machines_and_of_groups() -> None:
    """Also of ranks that are no neighbours, which no number can say."""
    cases = two_cases(dtype=torch.float64, steps=8)
    real = run_ranks(trajectories, 4, cases, [say for say, _, _ in WORKING])
    todo = [(case, island, order) for _, island, order in WORKING for case in cases]
    for (case, island, order), *ranks in zip(todo, *real, strict=True):

        def backward(model: Any, rank: int, step: int, order: Sequence[int] = order) -> None:
            gradient(model, order[rank], step)

        of_ranks = replace(case, island=island, backward=backward)
        expected = reference_trajectory(of_ranks, 4)
        islands = [ranks[rank] for rank in order]
        assert_follows(of_ranks, [steps[:-1] for steps in islands], expected)
        workers = reference_workers(of_ranks, 4)
        for _ in range(case.steps):
            workers.step(of_ranks.worker_backward)
        for steps in ranks:
            assert_close(of_ranks, steps[-1], workers.consensus, "finish()")
