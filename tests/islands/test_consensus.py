"""Pins averaged(), finish(), disable(), close() and copies with islands, against the reference."""

import copy
import pickle
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import commhooks
from tests.cases import ALGORITHMS, Case, with_tau
from tests.diloco.family import NESTEROV, deep_model
from tests.expected import (
    assert_close,
    assert_follows,
    assert_ranks_follow,
    reference_trajectory,
    reference_workers,
)
from tests.harness import run_ranks
from tests.reference import AllReduce
from tests.test_consensus import Seen, averaged_at_every_step, nested_blocks
from tests.training import Trainer, trajectories, wrapped


def cases(warmup_steps: int = 2, steps: int = 12) -> list[Case]:
    """Every algorithm, and one with several rounds in flight at once."""
    streaming = {"tau": 4, "fragments": 3, "delay": 3, "outer": NESTEROV, "alpha": 0.5}
    every = [(algorithm, list(with_tau(algorithm, 3))[-1]) for algorithm in ALGORITHMS]
    return [
        Case(
            algorithm,
            arguments,
            warmup_steps,
            dtype=torch.float64,
            steps=steps,
            model=deep_model,
            island=2,
        )
        for algorithm, arguments in [*every, ("DiLoCo", streaming)]
    ]


def test_averaged_shows_the_mean_and_disturbs_nothing() -> None:
    todo = cases()
    real = run_ranks(averaged_at_every_step, 4, todo, "register")
    for case, *ranks in zip(todo, *real, strict=True):
        workers = reference_workers(case, 4)
        for step in range(case.steps):
            x = workers.step(case.worker_backward)
            at_step: list[Seen] = [each[step] for each in ranks]
            for rank, seen in enumerate(at_step):
                where = f"rank {rank}, step {step + 1}"
                assert_close(case, seen.mine, x[rank // 2], where)
                assert_close(case, seen.inside, workers.consensus, f"consensus, {where}")
                assert torch.equal(seen.inside, at_step[0].inside), f"{where}: not the same"
                assert seen.put_back, where


def test_the_bare_form_has_islands_too() -> None:
    todo = [case for case in cases() if case.algorithm in ("LocalSGD", "OverlapLocalSGD", "DiLoCo")]
    assert_ranks_follow(todo, run_ranks(trajectories, 4, todo, "hook"))


def nested(todo: Sequence[Case]) -> list[list[bool]]:
    return [nested_blocks(case) for case in todo]


def test_nested_blocks_are_one() -> None:
    todo = [case for case in cases(0) if case.algorithm in ("EASGD", "DiLoCo")]
    for runs in run_ranks(nested, 4, todo):
        assert runs == [[True] * 4] * len(todo)


FINISHES: Sequence[Sequence[int]] = ([1, 2], [4, 10], [5])
"""Steps after which to finish: in warm-up and at its end, with rounds in flight, at a boundary."""


def finished(todo: Sequence[Case]) -> list[list[Tensor]]:
    return [Trainer(case).finishing(after) for case in todo for after in FINISHES]


def test_finish_ends_on_the_mean_and_training_goes_on() -> None:
    todo = cases(steps=14)
    each = [(case, finish_after) for case in todo for finish_after in FINISHES]
    for (case, finish_after), *real in zip(each, *run_ranks(finished, 4, todo), strict=True):
        workers = reference_workers(case, 4)
        expected = []
        for step in range(1, case.steps + 1):
            expected.append([x for x in workers.step(case.worker_backward) for _ in range(2)])
            if step in finish_after:
                consensus = workers.finish()
                expected.append([consensus] * 4)
                at = len(expected) - 1
                assert all(torch.equal(real[0][at], other[at]) for other in real)
        assert_follows(case, real, expected)


class Ends(NamedTuple):
    """The steps, the consensus inside a block at the end, and the model after finish()."""

    steps: list[Tensor]
    inside: Tensor
    finished: Tensor


def disabled(todo: Sequence[Case]) -> list[Ends]:
    runs = []
    for case in todo:
        trainer = Trainer(case)
        steps = [trainer.step() for _ in range(5)]
        trainer.state.disable()
        steps += [trainer.step() for _ in range(5, case.steps)]
        with trainer.state.averaged():
            inside = trainer.x
        trainer.state.finish()
        runs.append(Ends(steps, inside, trainer.x))
    return runs


def test_disable_goes_on_as_plain_ddp_over_all_ranks() -> None:
    """Momentum stays an island's own."""
    todo = cases(0, 9)
    for case, *ranks in zip(todo, *run_ranks(disabled, 4, todo), strict=True):
        workers = reference_workers(case, 4)
        expected = [workers.step(case.worker_backward) for _ in range(5)]
        workers.finish()
        workers.algorithm = AllReduce()
        expected += [workers.step(case.worker_backward) for _ in range(5, case.steps)]
        by_rank = [[x for x in each for _ in range(2)] for each in expected]
        assert_follows(case, [ends.steps for ends in ranks], by_rank)
        for ends in ranks:
            assert_close(case, ends.inside, workers.consensus, "averaged() after disable()")
            assert_close(case, ends.finished, workers.consensus, "finish() after disable()")


# Closing, and states that begin anew.


def closed(todo: Sequence[Case]) -> list[list[Tensor]]:
    """The same module goes on with a copy of the state, in islands, and then without."""
    runs = []
    for case in todo:
        trainer = Trainer(case)
        steps = [trainer.step() for _ in range(5)]
        for island in (2, None):
            trainer.state.finish()
            trainer.state.close()
            assert trainer.state.stats.step == 5
            twin = copy.deepcopy(trainer.state)
            twin.island = island
            trainer.state = twin
            trainer.model = wrapped(trainer.model.module)
            twin.register(trainer.model, *trainer.optimizers)
            steps += [trainer.step() for _ in range(5)]
        trainer.state.finish()
        runs.append([*steps, trainer.x])
    return runs


def test_closed_and_registered_anew() -> None:
    """Of a blocking and of a delayed algorithm, whose anchors begin where the last one ended."""
    todo = [case for case in cases(0) if case.algorithm in ("LocalSGD", "OverlapLocalSGD")]
    for case, *ranks in zip(todo, *run_ranks(closed, 4, todo), strict=True):
        workers = reference_workers(case, 4)
        expected = [workers.step(case.worker_backward) for _ in range(5)]
        workers.finish()
        expected += [workers.step(case.worker_backward) for _ in range(5)]
        by_rank = [[x for x in each for _ in range(2)] for each in expected]
        assert_follows(case, [steps[:10] for steps in ranks], by_rank)
        # After that every rank is a worker, and they end on their mean.
        assert not torch.equal(ranks[0][11], ranks[1][11])
        assert all(torch.equal(ranks[0][-1], steps[-1]) for steps in ranks)


def copies(case: Case) -> tuple[list[list[Tensor]], list[str]]:
    """The runs of a registered state's copies, and what those of one with a group are."""
    trainer = Trainer(case)
    for _ in range(5):
        trainer.step()
    runs = []
    for twin in (pickle.loads(pickle.dumps(trainer.state)), copy.copy(trainer.state)):
        again = Trainer(case, state=twin)
        runs.append([again.step() for _ in range(case.steps)])
    mine = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    with_group = commhooks.LocalSGD(tau=2, island=mine)
    others = (pickle.loads(pickle.dumps(with_group)), copy.deepcopy(with_group))
    assert with_group.island is mine
    return runs, [str(twin.island) for twin in others]


def test_a_copy_has_the_same_islands_and_no_group() -> None:
    case = Case("OverlapLocalSGD", {"tau": 2, "beta": 0.5}, dtype=torch.float64, island=2)
    expected = reference_trajectory(case, 4)
    ranks = run_ranks(copies, 4, case)
    for number in range(2):
        assert_follows(case, [runs[number] for runs, _ in ranks], expected)
    assert [islands for _, islands in ranks] == [["None", "None"]] * 4


def test_an_island_is_no_hyper_parameter() -> None:
    """It says where a run runs, not what it computes: a checkpoint may go on with others."""
    state = commhooks.LocalSGD(tau=2, island=4)
    assert "island" not in state.hyperparameters()
    assert pickle.loads(pickle.dumps(state)).island == 4
