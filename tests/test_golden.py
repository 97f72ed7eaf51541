"""Pins both the reference and the library to hand-checked trajectories of one weight, exactly."""

import pytest

from tests.expected import reference_trajectory
from tests.golden import Golden, load
from tests.harness import run_ranks
from tests.training import trajectory


@pytest.mark.parametrize("golden", load(), ids=str)
def test_the_reference_is_golden(golden: Golden) -> None:
    steps = reference_trajectory(golden.case, size=2)
    assert [[x[rank].item() for x in steps] for rank in range(2)] == golden.ranks


def scalars(golden: Golden) -> list[float]:
    return [x.item() for x in trajectory(golden.case)]


@pytest.mark.parametrize("golden", load(), ids=str)
def test_the_library_is_golden(golden: Golden) -> None:
    assert run_ranks(scalars, 2, golden) == golden.ranks
