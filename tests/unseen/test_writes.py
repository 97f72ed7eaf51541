"""Pins that weights written in mid-run are told once, as model.load_state_dict always was."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.cases import PERIODIC, one_case
from tests.harness import run_ranks
from tests.heard import heard
from tests.training import Trainer
from tests.unseen.together import gap

Write = Callable[[Trainer], None]


@torch.no_grad()
def shrink(trainer: Trainer) -> None:
    for p in trainer.model.parameters():
        p.mul_(0.5)


@torch.no_grad()
def one_layer_anew(trainer: Trainer) -> None:
    last = trainer.model.module[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


@torch.no_grad()
def from_a_vector(trainer: Trainer) -> None:
    parameters = list(trainer.model.parameters())
    flat = nn.utils.parameters_to_vector(parameters)
    offset = 0
    for p in parameters:
        p.copy_(flat[offset : offset + p.numel()].view(p.shape) + 0.1)
        offset += p.numel()


def written(write: Write) -> None:
    for algorithm in PERIODIC:
        for steps in (3, 4):  # between two boundaries, and right after one
            with heard() as lines:
                trainer = Trainer(one_case(algorithm, 2))
                for _ in range(steps):
                    trainer.step()
                write(trainer)
                for _ in range(4):
                    trainer.step()
            told = [line for line in lines if "written to in the middle" in line]
            assert len(told) == (algorithm != "LocalSGD"), (algorithm, steps, lines)


@pytest.mark.parametrize("write", [shrink, one_layer_anew, from_a_vector])
def test_it_is_told_once(write: Write) -> None:
    run_ranks(written, 2, write)


def after_finish() -> None:
    """Then the algorithm begins anew from what was written, and there is nothing to tell."""
    for algorithm in PERIODIC:
        with heard() as lines:
            trainer = Trainer(one_case(algorithm, 2))
            for _ in range(3):
                trainer.step()
            trainer.state.finish()
            shrink(trainer)
            small = trainer.x
            optimizer = trainer.optimizers[0]
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            for _ in range(4):
                trainer.step()
            torch.testing.assert_close(trainer.x, small)
            trainer.state.finish()
            torch.testing.assert_close(trainer.x, small)
            assert gap(trainer.x) == 0.0
        assert not [line for line in lines if "written to" in line], lines


def test_what_is_written_after_finish_is_where_it_begins() -> None:
    run_ranks(after_finish, 2)


def inside_averaged() -> None:
    with heard() as lines:
        trainer = Trainer(one_case("OverlapLocalSGD", 2))
        for _ in range(3):
            trainer.step()
            with trainer.state.averaged():
                shrink(trainer)
        trainer.step()
    assert not [line for line in lines if "written to" in line], lines


def test_what_is_written_inside_averaged_is_put_back() -> None:
    run_ranks(inside_averaged, 2)


class Clamps(nn.Linear):
    """Writes to its own weights at every forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


def in_the_forward() -> None:
    with heard() as lines:
        case = one_case("OverlapLocalSGD", 2, model=lambda dtype: Clamps(5, 3))
        trainer = Trainer(case)
        for _ in range(6):
            trainer.step()
    assert not [line for line in lines if "written to" in line], lines


def test_a_layer_that_writes_to_its_weights_belongs_to_the_step() -> None:
    run_ranks(in_the_forward, 2)
