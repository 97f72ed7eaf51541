"""The learning rate, by hand and as the recipe's optimizer gets it."""

from functools import partial

import pytest

from common.schedules import cosine_schedule, step_schedule

paper = partial(step_schedule, start=0.0625, warmup_steps=50, milestones=[1500, 2500], decay=0.1)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.1),
        (25, 0.85),
        (49, 1.57),
        (50, 1.6),
        (1499, 1.6),
        (1500, 0.16),
        (2499, 0.16),
        (2500, 0.016),
        (2999, 0.016),
    ],
)
def test_the_papers_schedule(step: int, rate: float) -> None:
    """0.1 to 1.6 over 5 epochs, x0.1 at 150 and 250 of 300, with 10 steps an epoch."""
    assert 1.6 * paper(step) == pytest.approx(rate)


def test_without_warm_up_and_milestones_it_is_constant() -> None:
    rates = {
        step_schedule(step, start=0.0, warmup_steps=0, milestones=[], decay=0.1)
        for step in range(10)
    }
    assert rates == {1.0}


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.1), (5, 0.55), (10, 1.0), (60, 0.6), (110, 0.2), (200, 0.2)]
)
def test_a_cosine_after_warm_up(step: int, rate: float) -> None:
    """Half-way down it is the mean of both ends, 1 and 0.2; past the end it stays there."""
    factor = cosine_schedule(step, start=0.1, warmup_steps=10, total_steps=110, end=0.2)
    assert factor == pytest.approx(rate)
