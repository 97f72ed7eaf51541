"""Random sequences of calls against a model of the state machine, on one rank and on two.

The model: the reference's trajectory, and how many boundaries have been reached. Every rank plays
the same collective calls; what is a rank's own (a skipped step, a checkpoint) differs by rank.
"""

import contextlib
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import commhooks
from tests.cases import PERIODIC, Case, with_tau
from tests.expected import assert_close, reference_workers
from tests.harness import run_ranks
from tests.reference import AllReduce
from tests.training import Trainer

CALLS = (
    *("step", "skip", "averaged", "nested", "refused", "train_inside"),
    *("save", "load", "finish", "disable", "evaluate", "raise"),
)
Calls = Sequence[str]

sequences = st.lists(
    st.one_of(st.just("step"), st.sampled_from(CALLS)), min_size=1, max_size=25
).map(tuple)
"""Half of the calls are steps, so that boundaries are reached."""


class Model(Trainer):
    """This rank, the reference of all ranks beside it, and the calls that both understand."""

    def __init__(self, case: Case) -> None:
        # The scale stays 1, so that gradients are not rounded.
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**9)
        super().__init__(case, scaler=self.scaler)
        self.overflows: set[tuple[int, int]] = set()
        self.disabled = False
        self.reference = reference_workers(case, dist.get_world_size())
        self.rounds = 0
        self.saved: dict[str, Any] | None = None

    def play(self, call: str) -> None:
        getattr(self, f"on_{call}")()
        self.check(call)

    def check(self, call: str) -> None:
        assert_close(self.case, self.x, self.reference.x[self.rank], call)
        stats = self.state.stats
        assert stats.step == self.steps, call
        assert stats.rounds_launched == self.rounds, call

    def on_step(self) -> None:
        self.step()
        self.reference.step(self.case.backward, self.overflows)
        if not self.averages_gradients(self.steps):
            k = self.steps - self.reference.started_at
            self.rounds += self.case.rounds(k) - self.case.rounds(k - 1)

    def averages_gradients(self, step: int) -> bool:
        return self.disabled or step <= self.case.warmup_steps

    def optimize(self) -> None:
        if (self.rank, self.steps) in self.overflows:
            next(p for p in self.model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
        for optimizer in self.optimizers:
            self.scaler.scale(torch.zeros(()))
            self.scaler.step(optimizer)
        self.scaler.update(1.0)
        self.model.zero_grad()

    def on_skip(self) -> None:
        """A step whose gradient overflows: on one rank, or on all where they are averaged."""
        number, size = self.steps + 1, dist.get_world_size()
        ranks = range(size) if self.averages_gradients(number) else [number % size]
        self.overflows.update((rank, number) for rank in ranks)
        self.on_step()

    def on_disable(self) -> None:
        self.state.disable()
        self.reference.finish()
        self.reference.algorithm = AllReduce()
        self.disabled = True

    def on_train_inside(self) -> None:
        with self.state.averaged(), pytest.raises(commhooks.RegistrationError):
            self.case.backward(self.model, self.rank, self.steps)
        self.model.zero_grad()

    def on_averaged(self) -> None:
        with self.state.averaged():
            assert_close(self.case, self.x, self.reference.consensus, "averaged")

    def on_nested(self) -> None:
        with self.state.averaged(), contextlib.suppress(KeyError), self.state.averaged():
            raise KeyError
        with contextlib.suppress(KeyError), self.state.averaged():
            raise KeyError

    def on_save(self) -> None:
        self.state.state_dict()

    def on_load(self) -> None:
        """Back into the same state: loading what has just been saved changes nothing."""
        self.state.load_state_dict(self.state.state_dict())

    def on_finish(self) -> None:
        self.state.finish()
        self.reference.finish()

    def on_evaluate(self) -> None:
        if self.rank == 0:
            with torch.no_grad():
                self.model(torch.zeros(2, 5, dtype=self.case.dtype))

    def on_raise(self) -> None:
        with contextlib.suppress(ZeroDivisionError):
            self.model(torch.zeros(2, 5, dtype=self.case.dtype))
            raise ZeroDivisionError

    def on_refused(self) -> None:
        with self.state.averaged(), pytest.raises(commhooks.RegistrationError):
            self.state.finish()


def play(games: Sequence[tuple[Case, Calls]]) -> None:
    for case, calls in games:
        model = Model(case)
        try:
            for call in calls:
                model.play(call)
            model.state.finish()
        except Exception as error:
            raise AssertionError(f"{case}: {' '.join(calls)}") from error


def drawn(number: int, seed: int) -> list[tuple[Case, Calls]]:
    """Games for several ranks, who must all play the same."""
    games: list[tuple[Case, Calls]] = []
    chance = random.Random(seed)

    @settings(
        max_examples=number,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(
        calls=sequences,
        tau=st.integers(1, 4),
        warmup=st.integers(0, 3),
        name=st.sampled_from(PERIODIC),
    )
    def draw(calls: Calls, tau: int, warmup: int, name: str) -> None:
        arguments = chance.choice(list(with_tau(name, tau)))
        games.append((Case(name, arguments, warmup, dtype=torch.float64), calls))

    draw()
    return games


@pytest.mark.parametrize("size", [1, 2])
def test_random_calls(size: int) -> None:
    run_ranks(play, size, drawn(40, size))


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_many_random_calls(size: int) -> None:
    run_ranks(play, size, drawn(400, 10 + size), timeout=800.0)
