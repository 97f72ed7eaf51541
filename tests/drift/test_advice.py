"""Pins what the log says once of a run that could do better, and that it says nothing else."""

import gc
import subprocess
import sys
import textwrap
import time
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commhooks
from commhooks.engine.advice import Advice
from tests.cases import Case, one_case
from tests.harness import run_ranks, scaled
from tests.heard import heard
from tests.training import Trainer


class Call:
    failed = False


def advice(delay: int | None, *, adapts: bool = False, speaks: bool = True) -> Advice:
    owner = Call()
    made = Advice(owner, "LocalSGD", Call(), delay, adapts=adapts, speaks=speaks)
    made.owner = owner  # type: ignore[attr-defined]
    return made


def told(rounds: int, **figures: Any) -> list[commhooks.Stats]:
    """``rounds`` rounds of 8 steps of 0.1 s; ``waited`` is what each of them was waited for."""
    waited = figures.pop("waited", 0.0)
    return [
        commhooks.Stats(tau=8, step_seconds=0.1, seconds_exposed=waited * number, **figures)
        for number in range(1, rounds + 1)
    ]


@pytest.mark.parametrize(
    ("delay", "figures", "words"),
    [
        (None, {"waited": 0.4, "round_seconds": 1.2}, "A tau of 15 would hide it"),
        (2, {"waited": 0.4, "round_seconds": 0.3}, "A delay of 4 would hide it"),
        (None, {"waited": 0.4, "round_seconds": 0.1}, "some rank is slower"),
        (None, {"relative_drift": 0.9}, "0.90 times their own size apart"),
        (0, {"relative_drift": 0.9}, "Take a smaller tau"),
    ],
)
def test_says_it_once(delay: int | None, figures: dict[str, Any], words: str) -> None:
    with heard() as lines:
        made = advice(delay)
        for stats in told(30, **figures):
            made.landed(stats)
    assert len(lines) == 1
    assert words in lines[0]


@pytest.mark.parametrize(
    ("delay", "figures"),
    [
        (None, {"waited": 0.01, "round_seconds": 0.5, "relative_drift": 0.2}),
        (0, {"waited": 0.8, "round_seconds": 0.8}),
        (None, {}),
    ],
)
def test_says_nothing_of_a_good_run(delay: int | None, figures: dict[str, Any]) -> None:
    with heard() as lines:
        made = advice(delay)
        for stats in told(30, **figures):
            made.landed(stats)
    assert lines == []


def test_a_few_bad_rounds_are_no_trend() -> None:
    with heard() as lines:
        made = advice(None)
        for _ in range(5):
            for stats in [*told(3, relative_drift=0.9), *told(1)]:
                made.landed(stats)
    assert lines == []


def test_one_rank_speaks_and_an_adaptive_tau_needs_no_advice() -> None:
    with heard() as lines:
        for made in (advice(None, speaks=False), advice(None, adapts=True)):
            for stats in told(30, waited=0.4, round_seconds=1.2):
                made.landed(stats)
    assert lines == []


def until_gone(engine: weakref.ref[Any]) -> None:
    """A thread of the backend may hold what it has called back for a moment longer."""
    deadline = time.monotonic() + scaled(10.0)
    while engine() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)


def ends(finishing: str) -> list[str]:
    """What is said when a state is gone."""
    with heard() as lines:
        trainer = Trainer(one_case("LocalSGD", 2))
        for _ in range(3):
            trainer.step()
        if finishing == "finish":
            trainer.state.finish()
        elif finishing == "averaged":
            with trainer.state.averaged():
                pass
        elif finishing == "disable":
            trainer.state.disable()
            trainer.step()
        engine = weakref.ref(trainer.state._engine)
        del trainer
        until_gone(engine)
    return [line for line in lines if "finish" in line]


@pytest.mark.parametrize("finishing", ["finish", "averaged", "disable", "nothing"])
def test_a_run_that_is_never_finished(finishing: str) -> None:
    """averaged() puts every rank's own model back, so that only a finish() ends the run."""
    for lines in run_ranks(ends, 2, finishing):
        assert len(lines) == (finishing in ("averaged", "nothing")), lines


def evaluations(inside: bool) -> list[str]:
    with heard() as lines:
        trainer = Trainer(one_case("LocalSGD", 2))
        x = torch.ones(2, 5)

        def evaluate() -> None:
            trainer.model.eval()
            with torch.no_grad():
                trainer.model(x)
            trainer.model.train()  # type: ignore[no-untyped-call]

        evaluate()  # all ranks still have the same model
        for _ in range(3):
            trainer.step()
            if inside:
                with trainer.state.averaged():
                    evaluate()
            else:
                evaluate()
        trainer.state.finish()
        evaluate()
    return [line for line in lines if "evaluated" in line]


@pytest.mark.parametrize("inside", [True, False])
def test_an_evaluation_outside_averaged(inside: bool) -> None:
    first, *others = run_ranks(evaluations, 2, inside)
    assert len(first) == (not inside)
    assert others == [[]]


def registrations() -> list[list[str]]:
    found = []
    for name, read in (
        ("OverlapLocalSGD", False),
        ("OverlapLocalSGD", True),
        ("LocalSGD", False),
    ):
        with heard() as lines:
            state = getattr(commhooks, name)(tau=2)
            if read:
                assert state.lr_factor > 1
            Trainer(Case(name, {"tau": 2}), state=state)
        found.append([line for line in lines if "learning rate" in line])
    return found


def test_a_learning_rate_that_nobody_asked_about() -> None:
    first, other = run_ranks(registrations, 2)
    assert [len(lines) for lines in first] == [1, 0, 0]
    assert "2.5 times" in first[0][0]
    assert other == [[], [], []]


def slow_together() -> list[str]:
    """Rank 1 needs five times as long for its steps."""
    with heard() as lines:
        trainer = Trainer(one_case("OverlapLocalSGD", 2))
        for _ in range(24):
            time.sleep(0.1 if dist.get_rank() else 0.02)
            trainer.step()
        trainer.state.finish()
    return [line for line in lines if "slower" in line]


def test_a_slow_rank_is_told_from_a_slow_link() -> None:
    first, _ = run_ranks(slow_together, 2)
    assert len(first) == 1


SCRIPT = textwrap.dedent(
    """
    import torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    import commhooks
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = commhooks.LocalSGD(tau=2)
    state.register(model, optimizer)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    {end}
    """
)


@pytest.mark.parametrize(("end", "said"), [("", True), ("state.finish()", False), ("1 / 0", False)])
def test_a_process_that_ends(end: str, said: bool) -> None:
    """With an error, it has been told something more important."""
    script = SCRIPT.format(end=end)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert ("never" in done.stderr or "finish()" in done.stderr) == said, done.stderr
