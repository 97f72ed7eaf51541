"""Pins layers whose weight is computed from a parameter and buffers: spectral norm, pruning.

The mean of unit vectors is no unit vector, and the mean of masks is no mask. In the consensus a
mask is the first rank's, and the vectors of a spectral norm are those of the mean of the weights.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from torch.optim import Adam, Optimizer

from tests.cases import Case
from tests.harness import run_ranks
from tests.training import Trainer
from tests.workload import initialise, seeded

Layer = Callable[[nn.Linear], nn.Module]


def with_hook(linear: nn.Linear) -> nn.Module:
    return spectral_norm(linear)


def with_parametrization(linear: nn.Linear) -> nn.Module:
    return parametrizations.spectral_norm(linear)


def pruned(linear: nn.Linear) -> nn.Module:
    """Its mask is made once DDP has been built, and each rank's is its own, see `own_masks`."""
    return prune.identity(linear, "weight")  # type: ignore[no-untyped-call,no-any-return]


def _two_layers(layer: Layer, dtype: torch.dtype) -> nn.Module:
    """Orthogonal weights: no direction stands out, so that the ranks' directions part soon."""
    first, last = nn.Linear(5, 16), nn.Linear(16, 3)
    initialise(nn.Sequential(first, last))
    with torch.no_grad():
        first.weight.copy_(torch.linalg.qr(first.weight).Q)
        last.weight.copy_(torch.linalg.qr(last.weight.T).Q.T)
    torch.manual_seed(1)  # of the power iteration's first vectors
    return nn.Sequential(layer(first), nn.Tanh(), layer(last))


def own_masks(module: nn.Module, rank: int) -> None:
    for name, buffer in module.named_buffers():
        if name.endswith("weight_mask"):
            buffer.copy_(torch.rand(buffer.shape, generator=seeded(1 + rank)) > 0.5)


def adam(model: nn.Module) -> Sequence[Optimizer]:
    return [Adam(model.parameters(), lr=0.015)]


class Seen(NamedTuple):
    """This rank's state dictionary, and in the consensus model that and the two layers' weights."""

    mine: dict[str, Tensor]
    consensus: dict[str, Tensor]
    weights: list[Tensor]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def look(layers: Sequence[Layer], algorithm: str) -> list[Seen]:
    """After four steps of a round of eight; and that the block leaves nothing behind."""
    seen = []
    for layer in layers:
        model = partial(_two_layers, layer)
        case = Case(algorithm, {"tau": 8}, model=model, optimizers=adam)
        trainer = Trainer(case)
        own_masks(trainer.model.module, trainer.rank)
        for _ in range(4):
            trainer.step()
        module = trainer.model.module.eval()
        mine = state_of(module)
        with torch.no_grad(), trainer.state.averaged():
            module(torch.zeros(1, 5))
            weights = [module.get_submodule(n).weight.clone() for n in "02"]
            seen.append(Seen(mine, state_of(module), weights))
        assert all(torch.equal(mine[name], value) for name, value in module.state_dict().items())
        trainer.model.train()  # type: ignore[no-untyped-call]
        trainer.step()
    return seen


def consensus_weight(ranks: Sequence[dict[str, Tensor]], number: str) -> Tensor:
    """The layer's weight out of the parameters' mean, and of the first rank's mask."""
    first = ranks[0]
    hook, parametrization = f"{number}.weight_", f"{number}.parametrizations.weight."
    raw = f"{hook}orig" if f"{hook}orig" in first else f"{parametrization}original"
    mean = torch.stack([rank[raw] for rank in ranks]).mean(0)
    if f"{hook}mask" in first:
        return mean * first[f"{hook}mask"]
    expected: Tensor = mean / torch.linalg.matrix_norm(mean, 2)
    return expected


@pytest.mark.parametrize("algorithm", ["LocalSGD", "OverlapLocalSGD"])
def test_the_weight_is_that_of_the_mean(algorithm: str) -> None:
    """With the first rank's u and v its largest singular value was up to 1.09."""
    layers = [with_hook, with_parametrization, pruned]
    for layer, *seen in zip(layers, *run_ranks(look, 3, layers, algorithm), strict=True):
        for position, number in enumerate("02"):
            expected = consensus_weight([each.mine for each in seen], number)
            for rank, each in enumerate(seen):
                off = (each.weights[position] - expected).abs().max().item()
                assert off < 2e-6, (layer.__name__, number, rank, off)
        for each in seen:
            assert all(torch.equal(seen[0].consensus[n], v) for n, v in each.consensus.items())


# Weights in which power iterations from one rank's vectors would stand still, or go on for long.


class Spectra(nn.Module):
    """A convolution with a transposed one, an embedding of bf16, and two norms on one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.corner = spectral_norm(nn.Linear(2, 2, bias=False))
        self.conv = parametrizations.spectral_norm(nn.Conv2d(3, 40, 3))
        self.turned = spectral_norm(nn.ConvTranspose2d(4, 6, 3))
        self.table = parametrizations.spectral_norm(nn.Embedding(9, 5).bfloat16())
        self.twice = parametrizations.spectral_norm(
            parametrizations.weight_norm(nn.Linear(5, 70, bias=False))
        )
        self.zero = parametrizations.spectral_norm(nn.Linear(3, 2, bias=False))
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + 0 * sum(p.sum().float() for p in self.parameters())


def spectra(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    return Spectra()


def write_apart(module: Spectra, rank: int) -> None:
    """Other weights on every rank, with the first one's vectors at rest in the wrong place."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(9, rank)))
        corner = [torch.tensor([2.0, 1.0]), torch.tensor([1.0, 4.0])][rank % 2]
        module.corner.get_parameter("weight_orig").copy_(corner.diag())
        for name in ("weight_u", "weight_v"):
            module.corner.get_buffer(name).copy_(torch.eye(2)[rank % 2])
        module.get_parameter("zero.parametrizations.weight.original").zero_()


def largest_values(algorithm: str) -> list[dict[str, float]]:
    """Largest singular values of the weights in averaged(), and after finish()."""
    trainer = Trainer(Case(algorithm, {"tau": 8}, model=spectra, optimizers=adam))
    module = trainer.model.module
    assert isinstance(module, Spectra)
    trainer.step()
    write_apart(module, trainer.rank)
    module.eval()
    seen = []
    with torch.no_grad(), trainer.state.averaged():
        seen.append(largest(module))
    trainer.state.finish()
    with torch.no_grad():
        seen.append(largest(module))
    return seen


def largest(module: Spectra) -> dict[str, float]:
    module.corner(torch.zeros(1, 2))
    module.turned(torch.zeros(1, 4, 5, 5))
    weights = {
        "corner": module.corner.weight,
        "conv": torch.flatten(module.conv.weight, 1),  # type: ignore[arg-type]
        "turned": module.turned.weight.transpose(0, 1).flatten(1),
        "table": module.table.weight.float(),
        "twice": module.twice.weight,
    }
    return {name: torch.linalg.matrix_norm(w, 2).item() for name, w in weights.items()}


def test_every_spectral_norm_is_one() -> None:
    first, *others = run_ranks(largest_values, 2, "OverlapLocalSGD")
    assert all(each == first for each in others)
    for values in first:
        for name, value in values.items():
            assert abs(value - 1) < (2e-2 if name == "table" else 1e-5), (name, value)
