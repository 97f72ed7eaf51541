"""Pins Ctrl-C on one rank inside averaged() and finish(), at moments all over them.

The others know nothing of it and go on with the collectives that the rank has walked away from.
"""

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import commhooks
from tests.cases import Case
from tests.expected import assert_close, assert_follows, reference_workers
from tests.harness import run_ranks
from tests.signals import Signals
from tests.training import Trainer

PACKAGE = str(Path(commhooks.__file__).parent)
MOMENTS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Parts of the way through the package's calls and returns."""

LOOKS = (None, None, *MOMENTS)
"""Nobody interrupts the first two, of which the shorter one says how many calls there are."""


class Clock:
    """Counts the calls and returns of the package's functions; at one of them comes SIGINT."""

    def __init__(self) -> None:
        self.ticks = 0

    @contextmanager
    def running(self, strikes_at: int = -1) -> Iterator[None]:
        self.ticks = 0

        def tick(frame: FrameType, event: str, arg: Any) -> None:
            if event in ("call", "return") and frame.f_code.co_filename.startswith(PACKAGE):
                self.ticks += 1
                if self.ticks == strikes_at:
                    sys.setprofile(None)
                    signal.raise_signal(signal.SIGINT)

        sys.setprofile(tick)
        try:
            yield
        finally:
            sys.setprofile(None)


def listen_to_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has no handler


def look(trainer: Trainer) -> None:
    with trainer.state.averaged():
        pass


def interrupted(
    cases: Sequence[Case], call: Callable[[Trainer], None], again: bool
) -> list[list[Tensor]]:
    """Parameters after every step, and after every call, which rank 1 is interrupted in.

    The loop makes the call again, where that is what it has to do, and goes on.
    """
    listen_to_interrupts()
    runs = []
    for case in cases:
        trainer, clock = Trainer(case), Clock()
        seen, interrupts, ticks = [], 0, 0
        for moment in LOOKS:
            seen += [trainer.step() for _ in range(3)]
            try:
                strikes_at = int(ticks * moment) if moment and trainer.rank == 1 else -1
                with clock.running(strikes_at):
                    call(trainer)
                ticks = min(ticks or clock.ticks, clock.ticks)
            except KeyboardInterrupt:
                interrupts += 1
                if again:
                    call(trainer)
            seen.append(trainer.x)
        assert interrupts == (len(MOMENTS) if trainer.rank == 1 else 0), (str(case), interrupts)
        runs.append(seen)
    return runs


CASES = [
    Case("LocalSGD", {"tau": 2}, dtype=torch.float64),
    Case("OverlapLocalSGD", {"tau": 2, "beta": 0.5}, dtype=torch.float64),
    Case("CoCoDSGD", {"tau": 4}, dtype=torch.float64),
    Case("BMUF", {"tau": 2}, warmup_steps=50, dtype=torch.float64),
    Case("DiLoCo", {"tau": 4, "fragments": 2, "delay": 3, "alpha": 0.5}, dtype=torch.float64),
    Case("SlowMo", {"tau": 2}, dtype=torch.float64),
    Case("AllReduce", dtype=torch.float64),
]


def test_the_loop_goes_on_after_an_interrupted_evaluation() -> None:
    """Own parameters are back, and every later round is the same as without the interrupt."""
    for case, *real in zip(CASES, *run_ranks(interrupted, 3, CASES, look, False), strict=True):
        workers, expected = reference_workers(case, 3), []
        for _ in LOOKS:
            expected += [workers.step(case.backward) for _ in range(3)]
            expected.append(expected[-1])
        assert_follows(case, real, expected)


def finish(trainer: Trainer) -> None:
    trainer.state.finish()


def test_an_interrupted_finish_is_called_again() -> None:
    for case, *real in zip(CASES, *run_ranks(interrupted, 3, CASES, finish, True), strict=True):
        workers, expected = reference_workers(case, 3), []
        for _ in LOOKS:
            expected += [workers.step(case.backward) for _ in range(3)]
            expected.append([workers.finish()] * 3)
        assert_follows(case, real, expected)


# The moment that matters in practice: this rank waits, and another is late.


def interrupted_while_waiting(
    cases: Sequence[Case], call: Callable[[Trainer], None], again: bool, signals: Signals
) -> list[tuple[Tensor, Tensor]]:
    """Ctrl-C comes while rank 1 waits for rank 0; the consensus and the end after more steps."""
    listen_to_interrupts()
    names = map(str, itertools.count())
    ends = []
    for case in cases:
        trainer, name = Trainer(case), next(names)
        for _ in range(3):
            trainer.step()
        if trainer.rank == 1:
            with pytest.raises(KeyboardInterrupt):
                struck(call, trainer, signals, name)
            if again:
                call(trainer)
        else:
            signals.await_(name)
            call(trainer)
        after = trainer.x
        for _ in range(5):
            trainer.step()
        with trainer.state.averaged():
            ends.append((after, trainer.x))
    return ends


def struck(call: Callable[[Trainer], None], trainer: Trainer, signals: Signals, name: str) -> None:
    """Ctrl-C a moment after ``call`` has begun, and only then the signal to the other rank."""

    def strike() -> None:
        time.sleep(0.2)  # where it does not wait yet, that is one more moment to survive
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        signals.give(name)

    threading.Thread(target=strike).start()
    call(trainer)


@pytest.mark.parametrize(("call", "again"), [(look, False), (finish, True)])
def test_interrupted_while_it_waits_for_another_rank(
    call: Callable[[Trainer], None], again: bool, tmp_path: Path
) -> None:
    signals = Signals(tmp_path)
    ranks = run_ranks(interrupted_while_waiting, 2, CASES, call, again, signals)
    for case, *ends in zip(CASES, *ranks, strict=True):
        workers = reference_workers(case, 2)
        for _ in range(3):
            workers.step(case.backward)
        if again:
            workers.finish()
        middle = workers.x
        for _ in range(5):
            workers.step(case.backward)
        for rank, (after, consensus) in enumerate(ends):
            assert_close(case, after, middle[rank], f"rank {rank}, after the call")
            assert_close(case, consensus, workers.consensus, f"rank {rank}, at the end")


def trains_on_after_an_interrupted_finish(cases: Sequence[Case], signals: Signals) -> list[Tensor]:
    """Rank 1 takes Ctrl-C for the end of it; the call was held together until all had finished."""
    listen_to_interrupts()
    ends = []
    for number, case in enumerate(cases):
        trainer = Trainer(case)
        for _ in range(3):
            trainer.step()
        if trainer.rank == 1:
            with pytest.raises(KeyboardInterrupt):
                struck(finish, trainer, signals, f"struck {number}")
        else:
            signals.await_(f"struck {number}")
            trainer.state.finish()
        for _ in range(5):
            trainer.step()
        trainer.state.finish()
        ends.append(trainer.x)
    return ends


def test_training_on_after_an_interrupted_finish(tmp_path: Path) -> None:
    ranks = run_ranks(trains_on_after_an_interrupted_finish, 2, CASES, Signals(tmp_path))
    for case, *ends in zip(CASES, *ranks, strict=True):
        workers = reference_workers(case, 2)
        for _ in range(3):
            workers.step(case.backward)
        workers.finish()
        for _ in range(5):
            workers.step(case.backward)
        for end in ends:
            assert_close(case, end, workers.finish(), "at the end")


def put_back_bit_for_bit(moments: int) -> bool:
    """One rank alone needs no other, so that every single moment can be tried."""
    listen_to_interrupts()
    trainer, clock = Trainer(CASES[1]), Clock()
    for _ in range(3):
        trainer.step()
    x = trainer.x
    with clock.running():
        look(trainer)
    for strikes_at in range(1, clock.ticks + 1, max(1, clock.ticks // moments)):
        try:
            with clock.running(strikes_at):
                look(trainer)
        except KeyboardInterrupt:
            pass
        if not torch.equal(trainer.x, x):
            return False
        x = trainer.step()  # which a block that was never left would refuse
    trainer.state.finish()
    return True


def test_what_an_interrupted_evaluation_puts_back() -> None:
    assert run_ranks(put_back_bit_for_bit, 1, 60) == [True]
