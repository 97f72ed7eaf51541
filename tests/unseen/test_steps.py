"""Pins that updates which no backward was counted for are told, and that the models meet again.

Until version 0.1 nothing was averaged then, and finish() left several models behind.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from tests.cases import ALGORITHMS, Case, one_case
from tests.harness import run_ranks
from tests.heard import heard
from tests.training import Form, Trainer
from tests.unseen.together import gap, mean
from tests.workload import batch

Step = Callable[[Trainer], None]


def loss_of(model: nn.Module, trainer: Trainer) -> Tensor:
    x, y = batch(trainer.rank, trainer.steps)
    return nn.functional.mse_loss(model(x), y)


def through_the_module(trainer: Trainer) -> None:
    torch.autograd.backward(loss_of(trainer.model.module, trainer))
    trainer.optimize()


def by_autograd_grad(trainer: Trainer) -> None:
    parameters = list(trainer.model.parameters())
    gradients = torch.autograd.grad(loss_of(trainer.model, trainer), parameters)
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    trainer.optimize()


def under_no_sync(trainer: Trainer) -> None:
    with trainer.model.no_sync():
        torch.autograd.backward(loss_of(trainer.model, trainer))
    trainer.optimize()


def by_a_functional_call(trainer: Trainer) -> None:
    """Parameters given to a functional form of the module within."""
    module = trainer.model.module
    x, y = batch(trainer.rank, trainer.steps)
    out = torch.func.functional_call(module, dict(module.named_parameters()), (x,))
    torch.autograd.backward(nn.functional.mse_loss(out, y))
    trainer.optimize()


UNSEEN = [through_the_module, by_autograd_grad, under_no_sync, by_a_functional_call]


def train(algorithms: list[str], step: Step, form: Form) -> None:
    for algorithm in algorithms:
        with heard() as lines:
            trainer = Trainer(one_case(algorithm, 2), form)
            if form == "hook":
                with torch.no_grad():
                    trainer.model(torch.zeros(1, 5))
            for _ in range(5):
                trainer.steps += 1
                step(trainer)
            assert trainer.state.stats.step == 0
            assert gap(trainer.x) > 1e-3
            expected = mean(trainer.x)
            with trainer.state.averaged():
                assert gap(trainer.x) == 0.0, algorithm
                torch.testing.assert_close(trainer.x, expected)
            assert gap(trainer.x) > 1e-3
            trainer.state.finish()
            assert gap(trainer.x) == 0.0, algorithm
        told = [line for line in lines if "no backward" in line]
        assert len(told) == 1, lines
        assert "ddp_model(x)" in told[0]


@pytest.mark.parametrize("form", ["register", "hook"])
@pytest.mark.parametrize("step", UNSEEN)
def test_they_are_told_once_and_the_models_meet(step: Step, form: Form) -> None:
    run_ranks(train, 2, list(ALGORITHMS), step, form)


def some_on_one_rank() -> None:
    """Steps that are seen on all ranks, and one on rank 1 that is not."""
    for algorithm in ALGORITHMS:
        with heard() as lines:
            trainer = Trainer(one_case(algorithm, 2))
            for _ in range(3):
                trainer.step()
            if trainer.rank == 1:
                through_the_module(trainer)
            expected = mean(trainer.x)
            with trainer.state.averaged():
                assert gap(trainer.x) == 0.0, algorithm
                torch.testing.assert_close(trainer.x, expected)
            trainer.state.finish()
            assert gap(trainer.x) == 0.0, algorithm
        assert any("no backward" in line for line in lines) == (trainer.rank == 1)


def test_a_step_that_one_rank_makes_alone() -> None:
    run_ranks(some_on_one_rank, 3)


def another_dtype_and_back() -> None:
    with heard() as lines:
        trainer = Trainer(one_case("OverlapLocalSGD", 2))
        for _ in range(3):
            trainer.step()
        trainer.model.bfloat16()
        with torch.no_grad():
            trainer.model(torch.zeros(1, 5, dtype=torch.bfloat16))
        trainer.model.float()
        for _ in range(4):
            trainer.steps += 1
            torch.autograd.backward(loss_of(trainer.model, trainer))
            trainer.optimize()
        trainer.state.finish()
        assert gap(trainer.x) == 0.0
    assert any("torch has dropped DDP's hooks" in line for line in lines), lines


def test_a_model_that_changes_its_dtype_in_mid_run() -> None:
    run_ranks(another_dtype_and_back, 2)


# What is seen, and must not be told.


def closure(trainer: Trainer) -> None:
    def compute() -> Tensor:
        trainer.optimizers[0].zero_grad()
        value = loss_of(trainer.model, trainer)
        torch.autograd.backward(value)
        return value

    trainer.optimizers[0].step(compute)  # type: ignore[arg-type]


def accumulating(trainer: Trainer) -> None:
    with trainer.model.no_sync():
        torch.autograd.backward(loss_of(trainer.model, trainer))
    torch.autograd.backward(loss_of(trainer.model, trainer))
    trainer.optimize()


def without_gradients(trainer: Trainer) -> None:
    """A step to quiet a scheduler, as many scripts make one."""
    trainer.optimize()
    torch.autograd.backward(loss_of(trainer.model, trainer))
    trainer.optimize()


def scaled(trainer: Trainer) -> None:
    torch.autograd.backward(loss_of(trainer.model, trainer))
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(()))
    scaler.step(trainer.optimizers[0])
    scaler.update()
    trainer.model.zero_grad()


def evaluating(trainer: Trainer) -> None:
    torch.autograd.backward(loss_of(trainer.model, trainer))
    trainer.optimize()
    with trainer.state.averaged(), torch.no_grad():
        loss_of(trainer.model, trainer)


def saving_and_loading(trainer: Trainer) -> None:
    torch.autograd.backward(loss_of(trainer.model, trainer))
    trainer.optimize()
    trainer.go_on(trainer.saved(), trainer.steps)


def exchanging_weights(trainer: Trainer) -> None:
    """An average over time takes the weights' place for an evaluation."""
    torch.autograd.backward(loss_of(trainer.model, trainer))
    trainer.optimize()
    with torch.no_grad():
        own = [p.clone() for p in trainer.model.parameters()]
        for p in trainer.model.parameters():
            p.mul_(0.9)
        loss_of(trainer.model, trainer)
        for p, mine in zip(trainer.model.parameters(), own, strict=True):
            p.copy_(mine)


def clipping(trainer: Trainer) -> None:
    """After every step, where few of the weights are ever outside."""
    torch.autograd.backward(loss_of(trainer.model, trainer))
    trainer.optimize()
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.clamp_(-0.8, 0.8)


def going_back(trainer: Trainer) -> None:
    """By one step, as after a spike."""
    if trainer.steps == 4:
        trainer.saved_before = trainer.saved()  # type: ignore[attr-defined]
    torch.autograd.backward(loss_of(trainer.model, trainer))
    trainer.optimize()
    if trainer.steps == 5:
        trainer.go_on(trainer.saved_before, 3)  # type: ignore[attr-defined]


def initialising_the_optimizer(trainer: Trainer) -> None:
    """A step at a rate of 0, as torch.distributed.checkpoint makes one."""
    torch.autograd.backward(loss_of(trainer.model, trainer))
    trainer.optimize()
    optimizer = trainer.optimizers[0]
    (group,) = optimizer.param_groups
    rate, group["lr"] = group["lr"], 0.0
    for p in trainer.model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    group["lr"] = rate


SEEN = [
    clipping,
    going_back,
    initialising_the_optimizer,
    closure,
    accumulating,
    without_gradients,
    scaled,
    evaluating,
    saving_and_loading,
    exchanging_weights,
]


def train_seen(step: Step) -> None:
    for algorithm in ("OverlapLocalSGD", "DiLoCo", "AllReduce"):
        for warmup in (0, 2):
            with heard() as lines:
                trainer = Trainer(one_case(algorithm, 2, warmup_steps=warmup))
                _ = trainer.state.lr_factor
                for _ in range(6):
                    trainer.steps += 1
                    step(trainer)
                trainer.state.finish()
            assert trainer.state.stats.step == (4 if step is going_back else 6)
            told = [line for line in lines if "wants" not in line]
            assert not told, told


@pytest.mark.parametrize("step", SEEN)
def test_what_is_seen_is_not_told(step: Step) -> None:
    run_ranks(train_seen, 2, step)


# Optimizers that step inside the backward.


def fused_backward(model: DistributedDataParallel) -> None:
    """An optimizer a parameter, which steps as soon as its gradient is there."""
    optimizers: dict[nn.Parameter, Optimizer] = {p: SGD([p], lr=0.1) for p in model.parameters()}

    def step(p: Tensor) -> None:
        assert isinstance(p, nn.Parameter)
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]


def fused(case: Case) -> list[str]:
    with heard() as lines:
        trainer = Trainer(Case(**{**vars(case), "optimizers": lambda model: []}), "hook")
        fused_backward(trainer.model)
        for _ in range(6):
            trainer.step()
        trainer.state.finish()
        assert gap(trainer.x) == 0.0
    return [line for line in lines if "wants" not in line]


def fused_everywhere() -> None:
    for algorithm in ALGORITHMS:
        for warmup in (0, 3):
            lines = fused(one_case(algorithm, 2, warmup_steps=warmup))
            if warmup or algorithm == "AllReduce":
                assert len([line for line in lines if "inside the backward" in line]) == 1, lines
            else:
                assert not [line for line in lines if "inside the backward" in line], lines
            assert not [line for line in lines if "no backward" in line], lines


def test_optimizers_that_step_inside_the_backward() -> None:
    run_ranks(fused_everywhere, 2)
