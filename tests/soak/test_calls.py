"""Random sequences of calls against a model of the state machine, on one rank and on two.

The model: the reference's trajectory, and how many boundaries have been reached. Every rank plays
the same collective calls; what is a rank's own (a skipped step, a checkpoint) differs by rank.
"""

import contextlib
import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import commhooks
from tests.cases import PERIODIC, Case, with_tau
from tests.expected import assert_close, reference_workers
from tests.harness import run_ranks
from tests.reference import AllReduce
from tests.training import Form, Trainer
from tests.unseen.together import gap
from tests.workload import (
    Backward,
    InItsOwnDtype,
    MakeModel,
    batch,
    gradient,
    initialise,
    nesterov_sgd,
    ragged_model,
    weights_and_biases,
)

CALLS = (
    *("step", "skip", "averaged", "nested", "refused", "train_inside"),
    *("save", "load", "finish", "disable", "evaluate", "raise"),
    *("averaged_before", "averaged_between", "save_before", "save_between", "evaluate_between"),
    *("unseen", "write", "scatter", "uneven"),
)
Calls = Sequence[str]

sequences = st.lists(
    st.one_of(st.just("step"), st.sampled_from(CALLS)), min_size=1, max_size=25
).map(tuple)
"""Half of the calls are steps, so that boundaries are reached."""


# Models.


def complex_model(dtype: torch.dtype) -> nn.Module:
    """Complex weights between real ones."""
    real, imaginary = torch.float64, torch.complex128
    layers = nn.Linear(5, 4, dtype=real), nn.Linear(4, 4, dtype=imaginary)
    return initialise(InItsOwnDtype(*layers, nn.Linear(4, 3, bias=False, dtype=imaginary)))


def mixed_model(dtype: torch.dtype) -> nn.Module:
    """In an order that no bucket of one format fits."""
    formats = (torch.float64, torch.float32, torch.float64)
    layers = [nn.Linear(5 - n, 4 - n, dtype=each) for n, each in enumerate(formats)]
    return initialise(InItsOwnDtype(*layers))


def magnitudes(model: nn.Module, rank: int, step: int) -> None:
    """Mean squared error of the outputs' magnitudes."""
    x, y = batch(rank, step, torch.float64)
    out = model(x).abs().double()
    torch.autograd.backward(nn.functional.mse_loss(out, y[:, : out.shape[1]]))


@dataclass(frozen=True)
class Loose(Case):
    """For models that compute in fp32 somewhere."""

    @property
    def tolerance(self) -> float:
        return 1e-5


@dataclass(frozen=True)
class Kind:
    """A model, and what is particular about playing with it."""

    model: MakeModel = ragged_model
    backward: Backward = gradient
    case: type[Case] = Case
    scaled: bool = True  # GradScaler takes no complex gradients


KINDS = (
    Kind(),
    Kind(complex_model, magnitudes, scaled=False),
    Kind(mixed_model, magnitudes, Loose),
)


@dataclass(frozen=True)
class Game:
    """What every rank plays: a case, a form of registration, and the calls."""

    case: Case
    form: Form
    scaled: bool
    calls: Calls

    def __str__(self) -> str:
        model = self.case.model.__name__
        return f"{self.case}-{model}-{self.form}-{dict(self.case.ddp)}: {' '.join(self.calls)}"


class Model(Trainer):
    """This rank, the reference of all ranks beside it, and the calls that both understand."""

    def __init__(self, game: Game) -> None:
        # The scale stays 1, so that gradients are not rounded.
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**9)
        self.scaler = scaler if game.scaled else None
        super().__init__(game.case, game.form, scaler=self.scaler)
        # Nobody tells the state of a step that is skipped: its boundary waits for the next call.
        self.skips_unseen = not game.scaled or game.form == "hook"
        self.overflows: set[tuple[int, int]] = set()
        self.disabled = False
        self.reference = reference_workers(game.case, dist.get_world_size())
        self.rounds = 0
        # Whether the anchors begin in the next local step, where all ranks are given one start:
        # since there are none yet, or since the parameters were written to after finish().
        self.begins = True
        self.rewritten = False
        self.finished_at = -1

    def play(self, call: str) -> None:
        getattr(self, f"on_{call}")()
        self.check(call)

    def check(self, call: str) -> None:
        assert_close(self.case, self.x, self.reference.x[self.rank], call)
        stats = self.state.stats
        assert stats.step == self.steps, call
        assert stats.rounds_launched == self.rounds, call

    def on_step(self, place: int = -1, look: Callable[[], None] | None = None) -> None:
        """A step, with a look before its ``place``-th optimizer steps."""
        self.steps += 1
        self.backward()
        self.reference.backward(self.case.backward)
        self.begin()
        skips = (self.rank, self.steps) in self.overflows
        if skips and self.scaler is not None:
            for p in self.model.parameters():  # every optimizer looks at its own alone
                p.grad.fill_(float("inf"))  # type: ignore[union-attr]
        for number, optimizer in enumerate(self.optimizers):
            if number == place and look is not None:
                look()
            if self.scaler is not None:
                self.scaler.scale(torch.zeros(()))
                self.scaler.step(optimizer)
            elif not skips:
                optimizer.step()
            self.reference.optimize(number, self.overflows)
        if self.scaler is not None:
            self.scaler.update(1.0)
        self.model.zero_grad()
        self.reference.end_step()
        if not self.averages_gradients(self.steps):
            k = self.steps - self.reference.started_at
            self.rounds += self.case.rounds(k) - self.case.rounds(k - 1)
        if self.overflows and self.skips_unseen:
            self.state.state_dict()

    def begin(self) -> None:
        """The first local step: all ranks go on from the parameters of the first one."""
        if (self.begins or self.rewritten) and not self.averages_gradients(self.steps):
            self.reference._assign([self.reference.x[0]] * dist.get_world_size())
            self.reference._start()
            self.begins = self.rewritten = False

    # What no hook tells of.

    def on_unseen(self) -> None:
        """An update by gradients that came past DDP: no step, and no average."""
        # Of a copy: DDP would take a backward through the module for that of a forward before.
        twin = copy.deepcopy(self.model.module)
        self.case.backward(twin, self.rank, self.steps + 1)
        for p, its in zip(self.model.parameters(), twin.parameters(), strict=True):
            p.grad = its.grad
        self.optimize()
        for rank in range(dist.get_world_size()):
            self.update_reference(rank)

    def update_reference(self, rank: int) -> None:
        model = self.reference.models[rank]
        model.zero_grad()
        self.case.backward(model, rank, self.steps + 1)
        for optimizer in self.reference.optimizers[rank]:
            optimizer.step()

    @torch.no_grad()
    def on_write(self) -> None:
        """All ranks write to their weights alike."""
        for p in self.model.parameters():
            p.mul_(0.5)
        self.reference._assign([x * 0.5 for x in self.reference.x])
        self.rewritten |= self.finished_at == self.steps

    def on_scatter(self) -> None:
        """Each rank writes something of its own, where all had one model."""
        if self.averages_gradients(self.steps + 1):
            return
        self.on_finish()
        with torch.no_grad():
            for p in self.model.parameters():
                p.mul_(1 + 0.1 * self.rank)
        self.reference._assign([x * (1 + 0.1 * rank) for rank, x in enumerate(self.reference.x)])
        self.rewritten = True
        self.on_step()

    def on_uneven(self) -> None:
        """One rank makes a step more than the others, and they meet all the same."""
        # DDP agrees on its buckets in one of the first forwards, for which it needs all ranks.
        if self.averages_gradients(self.steps + 1) or self.steps < 4 or self.begins:
            return
        self.on_finish()
        ahead = dist.get_world_size() - 1
        self.update_reference(ahead)
        if self.rank == ahead:
            super().step()
            self.steps -= 1
        for _ in range(2):
            with self.state.averaged():
                assert gap(_real(self.x)) == 0.0
        self.state.finish()
        assert gap(_real(self.x)) == 0.0
        self.steps += 1
        self.reference.steps = self.reference.started_at = self.finished_at = self.steps
        self.reference._assign([self.x] * dist.get_world_size())
        self.reference._start()
        self.rounds = self.state.stats.rounds_launched

    def averages_gradients(self, step: int) -> bool:
        return self.disabled or step <= self.case.warmup_steps

    def on_skip(self) -> None:
        """A step whose gradient overflows: on one rank, or on all where they are averaged."""
        number, size = self.steps + 1, dist.get_world_size()
        ranks = range(size) if self.averages_gradients(number) else [number % size]
        self.overflows.update((rank, number) for rank in ranks)
        self.on_step()

    # Looks between a backward and its optimizers' steps: a boundary that is due runs first, on the
    # parameters as they are.

    def on_averaged_before(self) -> None:
        self.on_step(0, self.look_averaged)

    def on_averaged_between(self) -> None:
        self.on_step(1, self.look_averaged)

    def on_save_before(self) -> None:
        self.on_step(0, self.look_save)

    def on_save_between(self) -> None:
        self.on_step(1, self.look_save)

    def on_evaluate_between(self) -> None:
        """The forward of an evaluation alone runs no boundary."""
        self.on_step(1, self.on_evaluate)

    def look_averaged(self) -> None:
        self.reference.run_due_boundary()
        self.on_averaged()

    def look_save(self) -> None:
        self.reference.run_due_boundary()
        self.on_save()

    def on_disable(self) -> None:
        self.on_finish()
        self.state.disable()
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
        self.rewritten = False
        self.finished_at = self.steps

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


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def play(games: Sequence[Game]) -> None:
    for game in games:
        model = Model(game)
        try:
            for call in game.calls:
                model.play(call)
            model.state.finish()
        except Exception as error:
            raise AssertionError(str(game)) from error


def drawn(number: int, seed: int) -> list[Game]:
    """Games for several ranks, who must all play the same."""
    games: list[Game] = []
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
        kind=st.sampled_from(KINDS),
        form=st.sampled_from(("register", "hook")),
        optimizers=st.sampled_from((nesterov_sgd, weights_and_biases)),
        static_graph=st.booleans(),
    )
    def draw(
        calls: Calls,
        tau: int,
        warmup: int,
        name: str,
        kind: Kind,
        form: Form,
        optimizers: Any,
        static_graph: bool,
    ) -> None:
        case = kind.case(
            name,
            chance.choice(list(with_tau(name, tau))),
            warmup,
            optimizers,
            torch.float64,
            model=kind.model,
            backward=kind.backward,
            ddp={"static_graph": True} if static_graph else {},
        )
        # The bare form knows all of its optimizers once they have stepped.
        first = ("step", "step") if form == "hook" else ()
        games.append(Game(case, form, kind.scaled, (*first, *calls)))

    draw()
    return games


FOUND = (
    # What such games have found: an evaluation, or writes at two steps on end, before finish().
    "step step step step step averaged step scatter step",
    "averaged scatter scatter step step step",
    "step scatter write step scatter step",
    # One rank's first step after finish(), and a call on the other.
    "step step step step uneven step uneven",
)


def test_calls_that_were_found() -> None:
    games = [
        Game(kind.case(name, {"tau": 3}, 1, dtype=torch.float64), "register", False, calls.split())
        for kind in KINDS[:1]
        for name in ("LocalSGD", "OverlapLocalSGD", "DiLoCo")
        for calls in FOUND
    ]
    run_ranks(play, 2, games)


@pytest.mark.parametrize("size", [1, 2])
def test_random_calls(size: int) -> None:
    run_ranks(play, size, drawn(40, size))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_many_random_calls(size: int) -> None:
    run_ranks(play, size, drawn(1700, 10 + size), timeout=3500.0)
