"""The small training problem of most tests, the same for real ranks and for the reference."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

TINY_CAP_MB = 1e-4
"""About 100 bytes: this small model falls into several buckets of ragged sizes."""


def seeded(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = seed * 1_000 + number
    return torch.Generator().manual_seed(seed)


def initialise(model: nn.Module) -> nn.Module:
    """Fill the parameters from a fixed seed, without touching the global one."""
    generator = seeded(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    return model


def ragged_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two layers whose sizes divide nothing: 35 + 7 + 21 + 3 parameters."""
    return initialise(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))).to(dtype)


class InItsOwnDtype(nn.Sequential):
    """Every layer computes in the format of its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = torch.tanh(layer(x.to(next(layer.parameters()).dtype)))
        return x


def batch(rank: int, step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs (4, 5) and targets (4, 3) of one rank's step; every rank sees its own."""
    generator = seeded(1 + rank, step)
    x, y = (
        torch.randn(4, 5, generator=generator),
        torch.randn(4, 3, generator=generator),
    )
    return x.to(dtype), (y + rank).to(dtype)


def loss(model: nn.Module, rank: int, step: int) -> Tensor:
    """Rank ``rank``'s mean squared error at ``step``."""
    x, y = batch(rank, step, next(model.parameters()).dtype)
    return nn.functional.mse_loss(model(x), y)


def gradient(model: nn.Module, rank: int, step: int) -> None:
    """Backward of `loss`."""
    torch.autograd.backward(loss(model, rank, step))


def trained(model: nn.Module) -> list[Tensor]:
    """The parameters that take part: those that require gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def plain_sgd(model: nn.Module) -> Sequence[Optimizer]:
    return [SGD(trained(model), lr=0.05)]


def nesterov_sgd(model: nn.Module) -> Sequence[Optimizer]:
    return [SGD(trained(model), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2)]


def adamw(model: nn.Module) -> Sequence[Optimizer]:
    return [AdamW(trained(model), lr=0.02, weight_decay=1e-2)]


def weights_and_biases(model: nn.Module) -> Sequence[Optimizer]:
    """Two optimizers that share one model."""
    return [
        SGD([p for p in trained(model) if p.ndim > 1], lr=0.05, momentum=0.9),
        AdamW([p for p in trained(model) if p.ndim <= 1], lr=0.02),
    ]


MakeModel = Callable[[torch.dtype], nn.Module]
MakeOptimizers = Callable[[nn.Module], Sequence[Optimizer]]
Backward = Callable[[nn.Module, int, int], object]
"""Leaves the gradient of (model, rank, step) in the model."""
