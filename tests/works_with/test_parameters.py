"""Pins what parameters may be: half precision, frozen, tied, channels_last, mixed, large, moved."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from tests.cases import PERIODIC, Case, two_cases, with_tau
from tests.expected import assert_ranks_follow
from tests.harness import run_ranks
from tests.training import Form, Trainer, trajectories
from tests.workload import initialise, plain_sgd, ragged_model, seeded


def test_bf16_parameters_are_averaged_in_fp32() -> None:
    """Two workers' mean, exact in fp32 and rounded once, is what bf16 weights must hold."""
    cases = two_cases(dtype=torch.bfloat16, optimizers=plain_sgd)
    assert_ranks_follow(cases, run_ranks(trajectories, 2, cases))


def spread_after_averaging_equals() -> float:
    """Three ranks that hold the same bf16 weights average them; how far that moves a weight."""
    trainer = Trainer(Case("LocalSGD", {"tau": 1}, dtype=torch.bfloat16, backward=no_gradient))
    before = trainer.x
    return (trainer.step() - before).abs().max().item()


def no_gradient(model: nn.Module, rank: int, step: int) -> None:
    torch.autograd.backward(model(torch.zeros(1, 5, dtype=torch.bfloat16)).sum() * 0)


def test_averaging_equal_bf16_parameters_changes_none() -> None:
    """A sum or a scale rounded to bf16 would: thirds are not representable."""
    assert run_ranks(spread_after_averaging_equals, 3) == [0.0, 0.0, 0.0]


def small_update(model: nn.Module, rank: int, step: int) -> None:
    """A gradient of 2^-6: with lr 1 it moves a bf16 weight of 2 by one unit in the last place."""
    (p,) = model.parameters()
    torch.autograd.backward((model(torch.zeros(1, 1)) + p.float() * 2**-6).sum())


class OneWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0], dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.float() * x


def one_weight(dtype: torch.dtype) -> nn.Module:
    return OneWeight()


def unit_sgd(model: nn.Module) -> Sequence[Optimizer]:
    return [SGD(model.parameters(), lr=1.0)]


def test_an_fp32_anchor_keeps_small_updates_of_bf16_parameters() -> None:
    """The elastic force moves the anchor by less than bf16 resolves, and none of it is lost."""
    case = Case(
        "EASGD",
        {"tau": 1, "alpha": 0.125},
        dtype=torch.bfloat16,
        model=one_weight,
        optimizers=unit_sgd,
        backward=small_update,
        steps=40,
    )
    assert_ranks_follow([case], run_ranks(trajectories, 2, [case]))


def partly_frozen(dtype: torch.dtype) -> nn.Module:
    model = ragged_model(dtype)
    model.get_submodule("0").requires_grad_(False)
    return model


def frozen_values(case: Case) -> list[Tensor]:
    """The frozen weights after training, inside `averaged`, and after `finish`.

    They are the same on all ranks, bits that no mean of three would keep.
    """
    trainer = Trainer(case)
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    with torch.no_grad():
        for p in frozen:
            p.fill_(1 / 3)
    for _ in range(5):
        trainer.step()
    seen = [torch.cat([p.flatten() for p in frozen])]
    with trainer.state.averaged():
        seen.append(torch.cat([p.flatten() for p in frozen]))
    trainer.state.finish()
    return [*seen, torch.cat([p.flatten() for p in frozen])]


@pytest.mark.parametrize("form", ["register", "hook"])
def test_frozen_parameters_take_no_part(form: Form) -> None:
    """Where they differ between ranks, see `tests.outside.test_frozen`."""
    cases = two_cases(model=partly_frozen)
    assert_ranks_follow(cases, run_ranks(trajectories, 2, cases, form))
    for seen in run_ranks(frozen_values, 3, cases[0]):
        assert all((values == torch.tensor(1 / 3)).all() for values in seen)


class Tied(nn.Module):
    """An autoencoder whose two layers share one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 3, bias=False)
        self.decoder = nn.Linear(3, 5, bias=False)
        self.head = nn.Linear(5, 3)
        self.decoder.weight = nn.Parameter(self.encoder.weight.detach().T.clone())
        self.encoder.weight = self.decoder.weight  # (5, 3): used transposed by the encoder

    def forward(self, x: Tensor) -> Tensor:
        coded = x @ self.encoder.weight
        decoded: Tensor = self.head(torch.tanh(self.decoder(coded)))
        return decoded


def tied_model(dtype: torch.dtype) -> nn.Module:
    return initialise(Tied()).to(dtype)


@pytest.mark.parametrize("form", ["register", "hook"])
def test_tied_parameters_are_mixed_once(form: Form) -> None:
    cases = two_cases(model=tied_model)
    assert_ranks_follow(cases, run_ranks(trajectories, 2, cases, form))


def convolutional(dtype: torch.dtype) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(54, 2))
    return initialise(model).to(dtype)


def channels_last(dtype: torch.dtype) -> nn.Module:
    return convolutional(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def image_gradient(model: nn.Module, rank: int, step: int) -> None:
    images = torch.randn(2, 3, 5, 5, generator=seeded(rank + 1, step)).double()
    torch.autograd.backward(model(images).square().mean())


def strides_kept(case: Case) -> bool:
    trainer = Trainer(case)
    for _ in range(4):
        trainer.step()
    trainer.state.finish()
    weight = next(trainer.model.parameters())
    return weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("form", ["register", "hook"])
def test_channels_last(form: Form) -> None:
    cases = two_cases(model=channels_last, backward=image_gradient, dtype=torch.float64)
    assert_ranks_follow(cases, run_ranks(trajectories, 2, cases, form))
    assert run_ranks(strides_kept, 2, cases[0]) == [True, True]


class Mixed(nn.Module):
    """fp64, fp32 and bf16 layers in one model, in an order that no bucket of one dtype fits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Linear(5, 4, dtype=torch.float64),
                nn.Linear(4, 4, dtype=torch.float32),
                nn.Linear(4, 4, dtype=torch.bfloat16),
                nn.Linear(4, 3, dtype=torch.float64),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x.to(next(layer.parameters()).dtype)))
        return x


def mixed_model(dtype: torch.dtype) -> nn.Module:
    return initialise(Mixed())


@pytest.mark.parametrize("form", ["register", "hook"])
def test_mixed_dtypes(form: Form) -> None:
    cases = two_cases(model=mixed_model, optimizers=plain_sgd)
    assert_ranks_follow(cases, run_ranks(trajectories, 2, cases, form))


def large_model(dtype: torch.dtype) -> nn.Module:
    """Layers of 400,000 and 130 parameters: longer than any cache-sized stretch."""
    return initialise(nn.Sequential(nn.Linear(5, 80_000, bias=False), nn.Linear(80_000, 3)))


@pytest.mark.parametrize("algorithm", PERIODIC)
def test_parameters_larger_than_a_bucket(algorithm: str) -> None:
    cases = [
        Case(algorithm, arguments, model=scaled_down, steps=7)
        for arguments in with_tau(algorithm, 2)
    ]
    assert_ranks_follow(cases, run_ranks(trajectories, 2, cases))


def scaled_down(dtype: torch.dtype) -> nn.Module:
    model = large_model(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.01)
    return model


def moved_trajectory(case: Case) -> list[Tensor]:
    """Somebody rebinds the parameters' memory in the middle, as ``module.to`` may."""
    trainer = Trainer(case)
    steps = []
    for _ in range(case.steps):
        if trainer.steps == 3:
            for p in trainer.model.parameters():
                p.data = p.data.clone()
        steps.append(trainer.step())
    return steps


def test_parameters_that_move_in_memory() -> None:
    for case in two_cases():
        assert_ranks_follow([case], [[steps] for steps in run_ranks(moved_trajectory, 2, case)])


def ignoring_trajectory() -> tuple[Tensor, Tensor]:
    """DDP is told to leave one parameter alone; it stays local, the others are averaged."""
    module = ragged_model()
    module._ddp_params_and_buffers_to_ignore = ["0.weight"]  # type: ignore[assignment]
    case = Case("LocalSGD", {"tau": 1}, model=lambda _: module)
    trainer = Trainer(case)
    for _ in range(2):
        trainer.step()
    first = module.get_submodule("0")
    assert isinstance(first, nn.Linear)
    return first.weight.detach(), first.bias.detach()


def test_parameters_that_ddp_ignores_stay_local() -> None:
    (weight_0, bias_0), (weight_1, bias_1) = run_ranks(ignoring_trajectory, 2)
    assert not torch.equal(weight_0, weight_1)
    assert torch.equal(bias_0, bias_1)
