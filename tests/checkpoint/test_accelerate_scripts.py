"""Pins ``commhooks.accelerate`` in scripts with hooks of their own, several states, an EMA."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

import commhooks.accelerate
from commhooks import CommHookState, RegistrationError, RoundError
from tests.accelerated import Scaling, normed_model, rank_environment
from tests.harness import rank_outcomes, run_ranks
from tests.reference import flat, mean
from tests.workload import adamw, loss, nesterov_sgd, ragged_model, trained

STEPS = 9
SAVED = (3, 5)
"""With tau=3 at a boundary, and between two, where the ranks' models differ."""


@dataclass(frozen=True)
class Setup:
    """What a script does besides training one model."""

    hooks: Literal["none", "before", "after"] = "none"
    """Whether the script registers save and load hooks of its own before the library's, or after"""
    ema: Literal["none", "before", "after"] = "none"
    adversary: bool = False
    """A second model with a state of its own."""
    scaling: Scaling | None = None
    form: Literal["register", "hook"] = "register"


class Ema:
    """A moving average with a state that only pickle understands, as Accelerate allows."""

    def __init__(self, model: nn.Module) -> None:
        self.decay = Fraction(9, 10)
        self.model = model
        self.shadow = [p.detach().clone() for p in trained(model)]

    def update(self) -> None:
        for mine, p in zip(self.shadow, trained(self.model), strict=True):
            mine.lerp_(p.detach(), float(1 - self.decay))

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "shadow": [each.clone() for each in self.shadow]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decay, self.shadow = state["decay"], state["shadow"]


class Script:
    """One rank of a training script."""

    def __init__(self, setup: Setup) -> None:
        rank_environment()
        from accelerate import Accelerator  # slow, and not every rank's business

        self.setup, self.rank, self.steps = setup, dist.get_rank(), 0
        self.scaling = setup.scaling
        self.accelerator = Accelerator(cpu=True)
        if self.scaling is not None:
            self.accelerator.scaler = self.scaling.scaler()
        states: list[CommHookState] = [commhooks.OverlapLocalSGD(tau=3, alpha=0.5, beta=0.7)]
        # DDP's first forward gives every rank rank 0's buffers, unless the state knows the model.
        parts = [(normed_model() if setup.form == "register" else ragged_model(), adamw)]
        if setup.adversary:
            states.append(commhooks.LocalSGD(tau=2))
            parts.append((ragged_model(), nesterov_sgd))
        self.states = states
        self.models: list[nn.Module] = []
        self.optimizers: list[Any] = []
        self.schedulers: list[Any] = []
        for (module, optimizers), state in zip(parts, states, strict=True):
            (optimizer,) = optimizers(module)
            model, optimizer, scheduler = self.accelerator.prepare(
                module, optimizer, ExponentialLR(optimizer, 0.9)
            )
            if setup.form == "register":
                state.register(model, optimizer, scaler=self.accelerator.scaler)
            else:
                model.register_comm_hook(state, commhooks.comm_hook)
            self.models.append(model)
            self.optimizers.append(optimizer)
            self.schedulers.append(scheduler)
        self.ema = Ema(self.models[0])
        if setup.hooks == "before":
            self.register_hooks()
        if setup.ema == "before":
            self.accelerator.register_for_checkpointing(self.ema)
        for state in self.order(states):
            commhooks.accelerate.checkpoint(self.accelerator, state)
        if setup.ema == "after":
            self.accelerator.register_for_checkpointing(self.ema)
        if setup.hooks == "after":
            self.register_hooks()

    def order(self, states: list[CommHookState]) -> list[CommHookState]:
        return states

    def register_hooks(self) -> None:
        """As diffusers' scripts have them, at their most thorough."""

        def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
            if self.accelerator.is_main_process:
                for number, model in enumerate(self.models):
                    values = self.accelerator.unwrap_model(model).state_dict()
                    torch.save(values, Path(folder) / f"unet_{number}")
                weights.clear()
                models.clear()

        def load(models: list[nn.Module], folder: str) -> None:
            models.clear()
            for number, model in enumerate(self.models):
                weights = torch.load(Path(folder) / f"unet_{number}")
                self.accelerator.unwrap_model(model).load_state_dict(weights)

        self.accelerator.register_save_state_pre_hook(save)
        self.accelerator.register_load_state_pre_hook(load)

    @property
    def x(self) -> Tensor:
        """Everything that is this rank's own."""
        values = [value for m in self.models for value in (*trained(m), *m.buffers())]
        rates = [torch.tensor(each.param_groups[0]["lr"]) for each in self.optimizers]
        shadow = [] if self.setup.ema == "none" else self.ema.shadow
        return flat([*(value.float() for value in values), *rates, *shadow])

    def step(self) -> Tensor:
        self.steps += 1
        for model, optimizer, scheduler in zip(
            self.models, self.optimizers, self.schedulers, strict=True
        ):
            value = loss(model, self.rank, self.steps)
            if self.scaling is not None and self.steps in self.scaling.overflows[self.rank]:
                value = value * float("inf")
            self.accelerator.backward(value)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        self.ema.update()
        return self.x

    def finish(self) -> Tensor:
        for state in self.states:
            state.finish()
        return self.x


def train(setup: Setup, folder: Path | None) -> tuple[list[Tensor], dict[int, Tensor]]:
    """What the rank held after every step, and its model when it was saved."""
    run = Script(setup)
    steps, saved = [], {}
    for step in range(1, STEPS + 1):
        steps.append(run.step())
        if folder is not None and step in SAVED:
            saved[step] = flat([v.float() for v in run.models[0].state_dict().values()])
            run.accelerator.save_state(str(folder / str(step)))
            run.accelerator.wait_for_everyone()
    return [*steps, run.finish()], saved


def resume(setup: Setup, folder: Path, step: int) -> list[Tensor]:
    run = Script(setup)
    torch.manual_seed(1000)  # nothing may depend on it
    if setup.form == "register":
        # A script may load in mid-run too.
        run.step()
    run.accelerator.load_state(str(folder / str(step)))
    run.steps = step
    return [run.x, *(run.step() for _ in range(step, STEPS)), run.finish()]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


SETUPS = {
    "hooks before": Setup(hooks="before"),
    "hooks after": Setup(hooks="after"),
    "adversary": Setup(adversary=True),
    "ema before": Setup(ema="before"),
    "ema after": Setup(ema="after"),
    "schedulers": Setup(scaling=Scaling({0: [2, 7], 1: [3, 4, 8]})),
    "bare form": Setup(form="hook"),
    "everything": Setup(hooks="after", adversary=True, ema="after"),
}


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_a_script_goes_on_bit_for_bit(tmp_path: Path, setup: Setup) -> None:
    """On every rank, in fresh processes; and the run that was saved is the one that was not."""
    bare, _ = zip(*run_ranks(train, 2, setup, None), strict=True)
    saved, _ = zip(*run_ranks(train, 2, setup, tmp_path), strict=True)
    for step in SAVED:
        again = run_ranks(resume, 2, setup, tmp_path, step)
        for rank in range(2):
            assert same(bare[rank], saved[rank]), f"saving changed rank {rank}"
            assert same(bare[rank][step - 1 :], again[rank]), f"rank {rank} from step {step}"
    assert not torch.equal(bare[0][4], bare[1][4]), "the ranks never differed"


@pytest.mark.parametrize("hooks", ["before", "after"])
def test_a_scripts_own_hook_saves_the_consensus_model(
    tmp_path: Path, hooks: Literal["before", "after"]
) -> None:
    _, saved = zip(*run_ranks(train, 2, Setup(hooks=hooks), tmp_path), strict=True)
    for step in SAVED:
        assert not torch.equal(saved[0][step], saved[1][step])
        found = torch.load(tmp_path / str(step) / "unet_0")
        expected = mean([saved[0][step], saved[1][step]])
        values = flat([value.float() for value in found.values()])
        torch.testing.assert_close(values, expected)
        assert not (tmp_path / str(step) / "model.safetensors").exists()


def start_elsewhere(setup: Setup, folder: Path) -> tuple[Tensor, Tensor]:
    """Where a rank of another world starts: its first model, and its EMA."""
    run = Script(setup)
    run.accelerator.load_state(str(folder))
    model = flat([value.float() for value in run.models[0].state_dict().values()])
    run.step()
    run.finish()
    return model, flat(run.ema.state_dict()["shadow"])


@pytest.mark.parametrize("hooks", ["none", "after"])
def test_another_number_of_ranks_starts_from_the_consensus(
    tmp_path: Path, hooks: Literal["none", "after"]
) -> None:
    setup = Setup(hooks=hooks, ema="before", adversary=True)
    _, saved = zip(*run_ranks(train, 2, setup, tmp_path), strict=True)
    ends = run_ranks(start_elsewhere, 3, setup, tmp_path / "5")
    for model, _ in ends:
        torch.testing.assert_close(model, mean([saved[0][5], saved[1][5]]))


class Disordered(Script):
    def order(self, states: list[CommHookState]) -> list[CommHookState]:
        return states if self.rank == 0 else states[::-1]


def checkpoint_in_disorder() -> None:
    Disordered(Setup(adversary=True))


def test_states_in_another_order_are_refused_on_every_rank() -> None:
    for end in rank_outcomes(checkpoint_in_disorder, 2):
        assert isinstance(end.error, RegistrationError), end.describe()
        assert "in another order" in str(end.error)
        assert "LocalSGD(tau=2" in str(end.error)


def save_on_the_main_process(folder: Path) -> None:
    """As all of diffusers' scripts do."""
    run = Script(Setup(hooks="after"))
    for _ in range(2):
        # DDP itself lays out its buckets anew, together with the other ranks, in the second one.
        run.step()
    if run.accelerator.is_main_process:
        run.accelerator.save_state(str(folder))
    # On to the boundary at which the second of the others' rounds is used; in the first one a rank
    # that is a step behind would have taken part.
    for _ in range(9):
        run.step()


def test_saving_on_the_main_process_alone_is_an_error_on_every_rank(tmp_path: Path) -> None:
    for end in rank_outcomes(save_on_the_main_process, 2, tmp_path / "saved"):
        assert isinstance(end.error, RoundError), end.describe()
        assert "not at the same point" in str(end.error)
