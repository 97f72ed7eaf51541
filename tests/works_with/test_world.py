"""Pins world size 1, where nothing is communicated, and models on a part of the ranks."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch.distributed as dist
from torch import Tensor

from tests.cases import ALGORITHMS, Case, two_cases, with_tau
from tests.collectives import counted_collectives
from tests.expected import assert_close, assert_follows, assert_ranks_follow, reference_trajectory
from tests.harness import run_ranks
from tests.reference import mean
from tests.training import Form, Trainer, trajectories
from tests.workload import adamw


def all_algorithms(**settings: int) -> list[Case]:
    return [
        Case(algorithm, arguments, optimizers=adamw, **settings)  # type: ignore[arg-type]
        for algorithm in ALGORITHMS
        for arguments in with_tau(algorithm, 3)
    ]


@pytest.mark.parametrize("form", ["register", "hook"])
def test_one_rank_follows_the_equations_too(form: Form) -> None:
    cases = [*all_algorithms(), *all_algorithms(warmup_steps=2)]
    assert_ranks_follow(cases, run_ranks(trajectories, 1, cases, form))


def collectives_of_a_whole_run(case: Case) -> dict[str, int]:
    trainer = Trainer(case)
    trainer.step()
    trainer.step()  # DDP agrees on its buckets once, by a broadcast
    with counted_collectives() as collectives:
        for _ in range(10):
            trainer.step()
        with trainer.state.averaged():
            pass
        trainer.state.state_dict()
        trainer.state.finish()
    assert trainer.state.stats.bytes_reduced == 0
    return dict(collectives)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_rank_communicates_nothing(algorithm: str) -> None:
    for arguments in with_tau(algorithm, 3):
        case = Case(algorithm, arguments)
        assert run_ranks(collectives_of_a_whole_run, 1, case) == [{}]


class PairTrainer(Trainer):
    """Trains within a process group, on the data of this rank's number in it."""

    def __init__(self, case: Case, group: dist.ProcessGroup, form: Form, told: bool) -> None:
        case = replace(case, ddp={"process_group": group})
        super().__init__(case, form, process_group=group if told else None)
        self.rank = dist.get_rank(group)


def pairwise_trajectory(
    case: Case, pairs: Sequence[Sequence[int]], form: Form, told: bool
) -> list[Tensor]:
    """Each pair of ranks trains a model of its own; a rank outside all pairs does nothing."""
    groups = [dist.new_group(list(pair)) for pair in pairs]
    for pair, group in zip(pairs, groups, strict=True):
        if dist.get_rank() in pair:
            trainer = PairTrainer(case, group, form, told)
            steps = [trainer.step() for _ in range(case.steps)]
            trainer.state.finish()
            return [*steps, trainer.x]
    return []


@pytest.mark.parametrize("pairs", [[(0, 1), (2, 3)], [(0, 3)], [(2, 1)]], ids=str)
@pytest.mark.parametrize(
    ("form", "told"), [("register", False), ("register", True), ("hook", True)]
)
def test_models_on_subgroups(pairs: Sequence[Sequence[int]], form: Form, told: bool) -> None:
    """``process_group=None`` means the DDP model's own; the bare form has to be told."""
    for case in two_cases(warmup_steps=2):
        ranks = run_ranks(pairwise_trajectory, 4, case, pairs, form, told)
        expected = reference_trajectory(case, 2)
        for pair in pairs:
            steps = [ranks[rank] for rank in sorted(pair)]
            assert_follows(case, [each[:-1] for each in steps], expected)
            for each in steps:
                assert_close(case, each[-1], mean(expected[-1]), "after finish")
