"""Pins the periods as functions: what they choose from what they are told."""

import math
import pickle
import random

import pytest

import commhooks
from commhooks.periods import QSR, AdaComm, Hidden, chosen


def told(**figures: float) -> commhooks.Stats:
    return commhooks.Stats(**figures)  # type: ignore[arg-type]


def test_hidden_starts_where_it_is_told_to() -> None:
    assert Hidden()(0, (), told()) == 8
    assert Hidden(first=3)(0, (), told()) == 3
    assert Hidden()(40, (), told(tau=5)) == 5


@pytest.mark.parametrize(
    ("round_seconds", "step_seconds", "tau"),
    [(1.0, 0.1, 12), (1.0, 1.0, 2), (0.01, 1.0, 1), (100.0, 0.1, 128), (2.5, 0.5, 6)],
)
def test_hidden_takes_the_smallest_with_a_fifth_to_spare(
    round_seconds: float, step_seconds: float, tau: int
) -> None:
    stats = told(tau=1000, round_seconds=round_seconds, step_seconds=step_seconds)
    assert Hidden()(9, (), stats) == tau


def test_hidden_needs_no_more_than_asked_and_settles() -> None:
    """On any link: enough, not much too long, and it stays where it is then."""
    draw = random.Random(0)
    for _ in range(2_000):
        period = Hidden(slack=draw.choice([0.1, 0.2, 1.0]), longest=draw.choice([16, 128]))
        seconds, step = 10 ** draw.uniform(-4, 2), 10 ** draw.uniform(-3, 0)
        tau = draw.randint(1, 200)
        for _ in range(3):
            tau = period(9, (), told(tau=tau, round_seconds=seconds, step_seconds=step))
        needed = max(1, math.ceil((1 + period.slack) * seconds / step))
        assert 1 <= tau <= period.longest
        assert tau >= min(period.longest, (1 + period.slack / 2) * seconds / step)
        assert tau <= (1 + period.slack) * needed
        again = told(tau=tau, round_seconds=seconds, step_seconds=step)
        assert period(9, (), again) == tau


def test_hidden_does_not_follow_noise() -> None:
    draw = random.Random(1)
    tau, seen = 8, set()
    for _ in range(100):
        seconds = 1.0 * draw.uniform(0.97, 1.03)
        tau = Hidden()(9, (), told(tau=tau, round_seconds=seconds, step_seconds=0.1))
        seen.add(tau)
    assert len(seen) <= 2, seen


def test_qsr_is_its_equation() -> None:
    period, before = QSR(tau_base=4, a=0.2), told(last_rate=1.0)
    assert [period(0, (rate,), before) for rate in (0.8, 0.1, 0.05, 0.01)] == [4, 4, 16, 400]
    assert period(0, (0.05, 0.01), before) == 16
    assert period(0, (0.05,), told(last_rate=0.05)) == 16
    assert QSR(4, 0.2, warmup_steps=10)(9, (0.001,), before) == 4
    assert QSR(4, 0.2, longest=64)(9, (0.001,), before) == 64
    assert QSR(4, 0.2)(9, (1e-300,), before) > 10**6


@pytest.mark.parametrize(
    ("rates", "last_rate"),
    [((0.01,), None), ((0.01,), 0.005), ((0.01,), 0.0), ((0.0,), 1.0), ((), 1)],
)
def test_qsr_makes_rounds_no_longer_where_the_rate_rises_or_is_0(
    rates: tuple[float, ...], last_rate: float
) -> None:
    period = QSR(tau_base=4, a=0.2)
    assert period(0, rates, told(last_rate=last_rate)) == 4
    assert period(9, rates, told(last_rate=last_rate, tau=12)) == 12
    assert QSR(4, 0.2, longest=8)(9, rates, told(last_rate=last_rate, tau=12)) == 8


def test_qsr_makes_rounds_shorter_where_the_rate_rises() -> None:
    assert QSR(tau_base=4, a=0.2)(9, (0.05,), told(last_rate=0.01, tau=300)) == 16


def test_adacomm_is_its_equation() -> None:
    period = AdaComm(tau0=10)
    losses = {2.0: 10, 1.0: 8, 0.5: 5, 0.02: 1, 0.0: 1, 8.0: 20}
    for loss, tau in losses.items():
        assert period(0, (), told(loss=loss, first_loss=2.0)) == tau
    assert period(0, (), told()) == 10


def test_adacomm_stays_where_it_is_told_nothing() -> None:
    period = AdaComm(tau0=10)
    assert period(9, (), told(tau=3, first_loss=2.0)) == 3
    assert period(9, (), told(tau=10, loss=-1.0)) == 10


def test_adacomm_has_a_limit_where_the_first_loss_was_near_0() -> None:
    assert AdaComm(tau0=10)(9, (), told(loss=2.0, first_loss=1e-300)) == 20


def test_no_answer_stops_the_rounds() -> None:
    """Whatever a function of the user's makes of one reading, it is asked again soon."""

    def odd(step: int, rates: object, stats: commhooks.Stats) -> int:
        return 10**12

    assert chosen(odd, 0, (), told()) == 128
    assert chosen(odd, 9, (), told(), now=5) == 10
    assert chosen(QSR(500, 0.1), 0, (0.1,), told()) == 500
    assert chosen(AdaComm(500), 0, (0.1,), told()) == 500
    # It has a limit of its own, and follows the link at once.
    link = told(tau=4, round_seconds=10.0, step_seconds=0.1)
    assert chosen("auto", 9, (), link, now=4) == 120


@pytest.mark.parametrize("period", [Hidden(slack=0.3), QSR(4, 0.1), AdaComm(5)])
def test_periods_are_plain_values(period: object) -> None:
    assert pickle.loads(pickle.dumps(period)) == period
    state = commhooks.OverlapLocalSGD(tau=period)  # type: ignore[arg-type]
    assert state.hyperparameters()["tau"] == repr(period)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Hidden(slack=0),
        lambda: Hidden(longest=0),
        lambda: QSR(0, 0.1),
        lambda: QSR(4, -1),
        lambda: AdaComm(0),
        lambda: commhooks.OverlapLocalSGD(tau="often"),  # type: ignore[arg-type]
        lambda: commhooks.OverlapLocalSGD(tau=0),
        lambda: commhooks.OverlapLocalSGD(tau=2.5),  # type: ignore[arg-type]
        lambda: commhooks.LocalSGD(tau="auto"),
        lambda: commhooks.SlowMo(tau=Hidden()),
        lambda: commhooks.DiLoCo(tau="auto"),
    ],
)
def test_bad_values_are_refused(make: object) -> None:
    with pytest.raises(commhooks.HyperParameterError):
        make()  # type: ignore[operator]
