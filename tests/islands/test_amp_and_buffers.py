"""Pins islands under a GradScaler, whose skipped steps they share, and with local buffers."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import commhooks
from tests.cases import Case, one_case, two_cases
from tests.expected import assert_close, reference_workers
from tests.harness import run_ranks
from tests.reference import mean
from tests.test_batchnorm import buffers, counters, normalised
from tests.training import Trainer
from tests.workload import MakeOptimizers, adamw, gradient, nesterov_sgd, plain_sgd
from tests.works_with.test_amp import ScaledTrainer

OVERFLOWS = {1: [3, 4], 2: [6], 3: [8]}
"""By rank. Island 0 (ranks 0, 1) skips a boundary of tau=2 and one of tau=3, island 1 others."""

SKIPPED = {(rank // 2, step) for rank, steps in OVERFLOWS.items() for step in steps}


def scaled(
    cases: Sequence[Case], give_scaler: bool
) -> list[tuple[list[Tensor], commhooks.Stats, float]]:
    """Every step, the counters, and the scale that the scaler has come to."""
    runs = []
    for case in cases:
        overflows = OVERFLOWS.get(torch.distributed.get_rank(), [])
        trainer = ScaledTrainer(case, give_scaler, overflows)
        steps = [trainer.step() for _ in range(case.steps)]
        trainer.state.finish()
        runs.append((steps, trainer.state.stats, trainer.scaler.get_scale()))
    return runs


@pytest.mark.parametrize("optimizers", [nesterov_sgd, adamw])
@pytest.mark.parametrize("give_scaler", [True, False], ids=["scaler", "unknown-scaler"])
def test_an_island_skips_a_step_as_one(optimizers: MakeOptimizers, give_scaler: bool) -> None:
    """The mean of its gradients is infinite on all of its ranks, and on those of no other."""
    cases = [
        *two_cases(optimizers=optimizers, island=2, dtype=torch.float64),
        Case(
            "DiLoCo",
            {"tau": 3, "fragments": 2, "delay": 2},
            optimizers=optimizers,
            island=2,
            dtype=torch.float64,
        ),
    ]
    for case, *ranks in zip(cases, *run_ranks(scaled, 4, cases, give_scaler), strict=True):
        workers = reference_workers(case, 4)
        for step in range(1, case.steps + 1):
            x = workers.step(case.worker_backward, SKIPPED)
            for rank, (steps, _, _) in enumerate(ranks):
                # Of a skipped step nobody tells the state, until the next forward.
                late = not give_scaler and (rank // 2, step) in SKIPPED
                if not late:
                    assert_close(case, steps[step - 1], x[rank // 2], f"rank {rank}, {step}")
        for (mine, _, scale), (other, _, same_scale) in (ranks[:2], ranks[2:]):
            assert all(torch.equal(p, q) for p, q in zip(mine, other, strict=True))
            assert scale == same_scale
        assert {stats.rounds_launched for _, stats, _ in ranks} == {case.rounds(case.steps)}


# Buffers.


def statistics(cases: Sequence[Case]) -> list[dict[str, Tensor]]:
    """Around the consensus, and those of a model with the same parameters that has no peers."""
    runs = []
    for case in cases:
        trainer, alone = Trainer(case), case.model(case.dtype)
        for step in range(1, 6):
            # A forward of the same parameters on this rank's batches, and on no others.
            own = dict(trainer.model.module.named_parameters())
            with torch.no_grad():
                for name, p in alone.named_parameters():
                    p.copy_(own[name])
            gradient(alone, trainer.rank, step)
            trainer.step()
        before, counted = buffers(trainer.model), counters(trainer.model)
        with trainer.state.averaged():
            inside = buffers(trainer.model)
        after, still_counted = buffers(trainer.model), counters(trainer.model)
        assert torch.equal(counted, still_counted)
        trainer.state.finish()
        runs.append(
            {
                "alone": buffers(alone),
                "before": before,
                "inside": inside,
                "after": after,
                "finished": buffers(trainer.model),
            }
        )
    return runs


def test_statistics_are_a_ranks_own_and_their_mean_is_over_all_ranks() -> None:
    """Of batches that differ inside an island, too."""
    cases = [
        Case("LocalSGD", {"tau": 3}, model=normalised, optimizers=plain_sgd, island=2),
        one_case("OverlapLocalSGD", 2, model=normalised, optimizers=plain_sgd, island=2),
        # Before the first local step, where no parameter is averaged.
        Case("EASGD", {"tau": 2}, 9, model=normalised, optimizers=plain_sgd, island=2),
    ]
    cases = [replace(case, dtype=torch.float64) for case in cases]
    for case, *ranks in zip(cases, *run_ranks(statistics, 4, cases), strict=True):
        expected = mean([seen["before"] for seen in ranks])
        for rank, seen in enumerate(ranks):
            where = f"{case}: rank {rank}"
            assert_close(case, seen["before"], seen["alone"], where)
            assert_close(case, seen["inside"], expected, where)
            assert torch.equal(seen["after"], seen["before"]), where
            assert torch.equal(seen["finished"], ranks[0]["finished"]), where
            assert_close(case, seen["finished"], expected, where)
        for one, other in (ranks[:2], ranks[2:], ranks[1:3]):
            assert not torch.equal(one["before"], other["before"])
