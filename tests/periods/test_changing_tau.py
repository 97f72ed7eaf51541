"""Pins when rounds are launched where tau changes, on ranks that see different clocks."""

import copy
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD

import commhooks
from commhooks.periods import QSR, AdaComm, Hidden
from tests.cases import Case
from tests.harness import run_ranks
from tests.training import Trainer
from tests.workload import loss as loss_of

PLAIN = partial(SGD, lr=0.8)


def longer_and_longer(step: int, rates: Sequence[float], stats: commhooks.Stats) -> int:
    return 2 + step // 5


def up_and_down(step: int, rates: Sequence[float], stats: commhooks.Stats) -> int:
    return (4, 1, 6, 2)[(stats.rounds_launched // 3) % 4]


def by_drift(step: int, rates: Sequence[float], stats: commhooks.Stats) -> int:
    return 1 + int(stats.relative_drift * 1e4) % 5 + int(stats.agreement * 1e3) % 3


def rounds(case: Case) -> tuple[list[int], list[int], Tensor]:
    """Rounds launched and tau after every step, and the parameters at the end."""
    trainer = Trainer(case)
    launched, tau = [], []
    for _ in range(case.steps):
        trainer.step()
        launched.append(trainer.state.stats.rounds_launched)
        tau.append(trainer.state.stats.tau)
    trainer.state.finish()
    return launched, tau, trainer.x


def launches(launched: Sequence[int]) -> list[int]:
    """The steps after which there was one more round."""
    before = [0, *launched]
    return [step for step, (a, b) in enumerate(pairwise(before), 1) if b > a]


def test_blocking_rounds_use_what_is_chosen_at_once() -> None:
    case = Case("LocalSGD", {"tau": longer_and_longer}, steps=30)
    wanted, at = [2], 2
    while at + longer_and_longer(at, (), commhooks.Stats()) <= 30:
        at += longer_and_longer(at, (), commhooks.Stats())
        wanted.append(at)
    for launched, _, _ in run_ranks(rounds, 3, case):
        assert launches(launched) == wanted


def test_overlapped_rounds_use_it_from_the_next_launch_on() -> None:
    """What is chosen where a round lands is the distance from that launch to the next."""
    case = Case("OverlapLocalSGD", {"tau": longer_and_longer, "beta": 0.7}, steps=40)
    # Nothing is known at the first launch; from the second on, there is a round to land.
    wanted = [2, 4]
    while wanted[-1] + longer_and_longer(wanted[-1], (), commhooks.Stats()) <= 40:
        wanted.append(wanted[-1] + longer_and_longer(wanted[-1], (), commhooks.Stats()))
    for launched, _, _ in run_ranks(rounds, 2, case):
        assert launches(launched) == wanted


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("LocalSGD", {}),
    ("OverlapLocalSGD", {"beta": 0.7}),
    ("EASGD", {}),
    ("CoCoDSGD", {}),
    ("SlowMo", {}),
    ("BMUF", {}),
    ("DiLoCo", {"outer": PLAIN, "delay": 2, "merge": "carry"}),
    ("DiLoCo", {"outer": PLAIN, "fragments": 3, "delay": 1, "alpha": 0.5}),
    ("DiLoCo", {"outer": PLAIN, "fragments": 4, "delay": 4, "alpha": 0.5}),
]


def all_of_them(cases: Sequence[Case]) -> list[tuple[list[int], list[int], Tensor]]:
    return [rounds(case) for case in cases]


@pytest.mark.parametrize("period", [longer_and_longer, up_and_down, by_drift])
@pytest.mark.parametrize(("m", "island"), [(2, 1), (3, 1), (4, 2)])
def test_all_ranks_launch_alike(period: Any, m: int, island: int) -> None:
    cases = [
        Case(name, {"tau": period, **rest}, 3, steps=40, island=island) for name, rest in SETTINGS
    ]
    first, *others = run_ranks(all_of_them, m, cases)
    for other in others:
        for case, mine, theirs in zip(cases, first, other, strict=True):
            assert mine[:2] == theirs[:2], case
            assert torch.equal(mine[2], theirs[2]), case
    assert all(len({*tau}) > 1 for _, tau, _ in first)


def resumed(cases: Sequence[Case], at: int, alone: int | None) -> list[tuple[Tensor, Tensor]]:
    """The end of a run, and of one that went on from a checkpoint.

    One rank looks at its state besides, which waits for its rounds before the others do.
    """
    found = []
    for case in cases:
        trainer = Trainer(case)
        saved = None
        for step in range(1, case.steps + 1):
            trainer.step()
            if alone == dist.get_rank():
                trainer.state.state_dict()
            if step == at:
                saved = trainer.saved()
        assert saved is not None
        again = Trainer(case)
        again.go_on(copy.deepcopy(saved), at)
        for _ in range(at, case.steps):
            again.step()
        assert again.state.stats.rounds_launched == trainer.state.stats.rounds_launched
        found.append((trainer.x, again.x))
    return found


@pytest.mark.parametrize("period", [up_and_down, by_drift])
@pytest.mark.parametrize(("m", "island"), [(2, 1), (4, 2)])
def test_resumed_bit_for_bit(period: Any, m: int, island: int) -> None:
    for at in (7, 11, 16):
        cases = [
            Case(name, {"tau": period, **rest}, steps=30, island=island) for name, rest in SETTINGS
        ]
        for rank in run_ranks(resumed, m, cases, at, 1):
            for case, (whole, parts) in zip(cases, rank, strict=True):
                assert torch.equal(whole, parts), (case, at)


def with_clocks_apart() -> tuple[list[int], list[int]]:
    case = Case("OverlapLocalSGD", {"tau": "auto"}, steps=40)
    trainer = Trainer(case)
    seen = []
    for step in range(40):
        # Rank 1 is slow at first, rank 0 later.
        time.sleep(0.002 if (step < 20) == (dist.get_rank() == 1) else 0.0)
        trainer.step()
        seen.append((trainer.state.stats.tau, trainer.state.stats.rounds_launched))
    return [tau for tau, _ in seen], [launched for _, launched in seen]


def test_ranks_with_other_clocks_agree() -> None:
    first, *others = run_ranks(with_clocks_apart, 3)
    assert all(other == first for other in others)
    assert len({*first[0]}) > 1


def with_a_schedule() -> list[int]:
    period = QSR(tau_base=2, a=0.2, warmup_steps=4)
    trainer = Trainer(Case("LocalSGD", {"tau": period}))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizers[0], lambda step: 2.0 * 0.95**step
    )
    launched = []
    for _ in range(40):
        trainer.step()
        launched.append(trainer.state.stats.rounds_launched)
        scheduler.step()
    return launches(launched)


def test_qsr_under_a_schedule() -> None:
    wanted, at, tau = [2], 2, 2
    while at < 40:
        rate = 0.05 * 2.0 * 0.95 ** (at - 1)  # in force at the launch
        tau = 2 if at < 4 else min(2 * tau, max(2, int((0.2 / rate) ** 2)))
        at += tau
        wanted += [at] if at <= 40 else []
    for found in run_ranks(with_a_schedule, 2):
        assert found == wanted


def with_losses(form: str) -> list[int]:
    trainer = Trainer(Case("LocalSGD", {"tau": AdaComm(6)}))
    launched = []
    for step in range(1, 41):
        value = loss_of(trainer.model.module, 0, 1).detach()
        # The ranks tell different losses, whose mean is 4 / step^2.
        told = 4.0 / step**2 * (0.5 + dist.get_rank())
        trainer.state.observe(torch.full_like(value, told) if form == "tensor" else told)
        trainer.step()
        launched.append(trainer.state.stats.rounds_launched)
    return launches(launched)


@pytest.mark.parametrize("form", ["tensor", "number"])
def test_adacomm_takes_the_mean_loss_of_all_ranks(form: str) -> None:
    def mean(first: int, last: int) -> float:
        return sum(4.0 / step**2 for step in range(first, last + 1)) / (last - first + 1)

    wanted, first = [6], mean(1, 6)
    begin = 1
    while True:
        at = wanted[-1]
        following = at + AdaComm(6)(at, (), commhooks.Stats(loss=mean(begin, at), first_loss=first))
        if following > 40:
            break
        begin = at + 1
        wanted.append(following)
    for found in run_ranks(with_losses, 2, form):
        assert found == wanted


def broken_at_20(step: int, rates: Sequence[float], stats: commhooks.Stats) -> int:
    if step >= 20:
        raise ValueError("no more of this")
    return 4


def no_number(step: int, rates: Sequence[float], stats: commhooks.Stats) -> Any:
    return 4 if step < 20 else 2.5


def failing(period: Any) -> tuple[int, str, Tensor]:
    trainer = Trainer(Case("LocalSGD", {"tau": period}))
    for _ in range(40):
        try:
            trainer.step()
        except commhooks.RoundError as error:
            return trainer.steps, str(error), trainer.x
    raise AssertionError("no error")


@pytest.mark.parametrize("period", [broken_at_20, no_number])
def test_a_period_that_fails_is_an_error_on_every_rank(period: Any) -> None:
    found = run_ranks(failing, 3, period)
    assert {steps for steps, _, _ in found} == {20}
    assert all("The period" in text for _, text, _ in found)


def own_clock(step: int, rates: Sequence[float], stats: commhooks.Stats) -> int:
    return 2 + dist.get_rank()


def refused(period: Any) -> str:
    with pytest.raises(commhooks.RegistrationError) as caught:
        Trainer(Case("LocalSGD", {"tau": period}))
    return str(caught.value)


def test_ranks_that_choose_differently_are_told_at_registration() -> None:
    for text in run_ranks(refused, 2, own_clock):
        assert "the first tau" in text


def later_own_clock(step: int, rates: Sequence[float], stats: commhooks.Stats) -> int:
    return 4 if step < 8 else 2 + dist.get_rank()


def parting() -> str:
    trainer = Trainer(Case("LocalSGD", {"tau": later_own_clock}))
    try:
        while trainer.steps < 40:
            trainer.step()
    except commhooks.RoundError as error:
        return str(error)
    raise AssertionError("no error")


def test_ranks_that_choose_differently_later_are_told_where_they_are() -> None:
    for text in run_ranks(parting, 2, group_timeout=20.0):
        assert "not at the same point" in text


def hidden_is_what_auto_means() -> None:
    state = commhooks.OverlapLocalSGD(tau="auto")
    assert state.hyperparameters()["tau"] == "auto"
    trainer = Trainer(Case("OverlapLocalSGD", {"tau": Hidden(first=3)}))
    for _ in range(3):
        trainer.step()
    assert trainer.state.stats.rounds_launched == 1


def test_hidden_begins_at_its_first() -> None:
    run_ranks(hidden_is_what_auto_means, 2)
