"""What the reference says of a case, and the comparison with what real ranks did."""

from collections.abc import Sequence

from torch import Tensor

from tests.cases import Case
from tests.reference import Workers


def reference_workers(case: Case, size: int) -> Workers:
    """``size`` workers in this process, set up as the case says."""
    model = case.model(case.dtype)
    return Workers(case.reference(), model, case.optimizers, size, case.warmup_steps)


def reference_trajectory(case: Case, size: int) -> list[list[Tensor]]:
    """Every worker's parameters after every step."""
    workers = reference_workers(case, size)
    return [workers.step(case.backward) for _ in range(case.steps)]


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


def assert_ranks_follow(cases: Sequence[Case], ranks: Sequence[Sequence[Sequence[Tensor]]]) -> None:
    """``ranks[rank][case][step]``, as several ranks return it, against the reference."""
    for case, *real in zip(cases, *ranks, strict=True):
        assert_follows(case, real, reference_trajectory(case, len(ranks)))
