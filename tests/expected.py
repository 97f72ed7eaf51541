"""What the reference says of a case, and the comparison with what real ranks did."""

from collections.abc import Sequence

import torch
from torch import Tensor

from commhooks import Stats
from tests.cases import Case
from tests.reference import AllReduce, Workers


def reference_workers(case: Case, size: int) -> Workers:
    """The workers that ``size`` ranks make, in this process, set up as the case says."""
    model, workers = case.model(case.dtype), size // case.island
    return Workers(
        case.reference(), model, case.optimizers, workers, case.warmup_steps, case.compression
    )


def reference_trajectory(case: Case, size: int) -> list[list[Tensor]]:
    """Every rank's parameters after every step."""
    workers = reference_workers(case, size)
    steps = [workers.step(case.worker_backward) for _ in range(case.steps)]
    return [[x for x in each for _ in range(case.island)] for each in steps]


def assert_follows(
    case: Case, real: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]
) -> None:
    """``real[rank][step]`` against ``expected[step][rank]``, to the case's tolerance."""
    assert all(len(steps) == len(expected) for steps in real)
    for step, vectors in enumerate(expected, start=1):
        for rank, vector in enumerate(vectors):
            assert_close(case, real[rank][step - 1], vector, f"rank {rank}, step {step}")


def assert_close(case: Case, real: Tensor, expected: Tensor, where: str) -> None:
    worst = (real - expected).abs().max().item()
    assert worst <= case.tolerance, f"{case}: {where}: off by {worst}"


def assert_plain_ddp_follows(
    case: Case, ranks: Sequence[tuple[Sequence[Tensor], Tensor, Tensor]], disabled_after: int
) -> None:
    """Each rank's steps, and the models inside averaged() and after finish() at the end."""
    workers = reference_workers(case, len(ranks))
    expected = [workers.step(case.backward) for _ in range(disabled_after)]
    workers.finish()
    workers.algorithm = AllReduce()
    expected += [workers.step(case.backward) for _ in range(disabled_after, case.steps)]
    assert_follows(case, [steps for steps, _, _ in ranks], expected)
    for _, inside, finished in ranks:
        assert_close(case, inside, workers.consensus, "averaged() after disable()")
        assert_close(case, finished, workers.consensus, "finish() after disable()")


def assert_shadowed(
    case: Case, ends: Sequence[tuple[Tensor, Stats]], lengths: Sequence[int]
) -> None:
    """The same model everywhere: those with few batches took part in the rounds of the others."""
    workers, longest = reference_workers(case, len(ends)), max(lengths)
    skipped = {
        (rank, step)
        for rank, length in enumerate(lengths)
        for step in range(length + 1, longest + 1)
    }
    for _ in range(longest):
        workers.step(case.backward, skipped)
    for x, stats in ends:
        assert torch.equal(x, ends[0][0])
        assert_close(case, x, workers.consensus, f"{lengths}")
        assert stats.rounds_completed == case.rounds(longest)


def assert_ranks_follow(cases: Sequence[Case], ranks: Sequence[Sequence[Sequence[Tensor]]]) -> None:
    """``ranks[rank][case][step]``, as several ranks return it, against the reference."""
    for case, *real in zip(cases, *ranks, strict=True):
        assert_follows(case, real, reference_trajectory(case, len(ranks)))
