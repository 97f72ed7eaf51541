"""Pins layers whose weight is computed from a parameter and buffers: spectral norm, pruning.

The mean of unit vectors is no unit vector, and the mean of masks is no mask.
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
    """This rank's state dictionary, and the two layers' weights in the consensus model."""

    mine: dict[str, Tensor]
    weights: list[Tensor]


def look(layers: Sequence[Layer], algorithm: str) -> list[Seen]:
    """After four steps of a round of eight."""
    seen = []
    for layer in layers:
        model = partial(_two_layers, layer)
        case = Case(algorithm, {"tau": 8}, model=model, optimizers=adam)
        trainer = Trainer(case)
        own_masks(trainer.model.module, trainer.rank)
        for _ in range(4):
            trainer.step()
        module = trainer.model.module.eval()
        mine = {name: value.clone() for name, value in module.state_dict().items()}
        with torch.no_grad(), trainer.state.averaged():
            module(torch.zeros(1, 5))
            seen.append(Seen(mine, [module.get_submodule(n).weight.clone() for n in "02"]))
        trainer.model.train()  # type: ignore[no-untyped-call]
        trainer.step()
    return seen


def consensus_weight(ranks: Sequence[dict[str, Tensor]], number: str) -> Tensor:
    """The layer's weight out of the parameters' mean and the first rank's buffers."""
    first = ranks[0]
    hook, parametrization = f"{number}.weight_", f"{number}.parametrizations.weight."
    raw = f"{hook}orig" if f"{hook}orig" in first else f"{parametrization}original"
    mean = torch.stack([rank[raw] for rank in ranks]).mean(0)
    if f"{hook}mask" in first:
        return mean * first[f"{hook}mask"]
    u, v = (
        (first[f"{hook}u"], first[f"{hook}v"])
        if f"{hook}u" in first
        else (first[f"{parametrization}0._u"], first[f"{parametrization}0._v"])
    )
    return mean / (u @ mean @ v)


@pytest.mark.parametrize("algorithm", ["LocalSGD", "OverlapLocalSGD"])
def test_the_weight_is_that_of_the_mean_and_the_first_ranks_buffers(algorithm: str) -> None:
    layers = [with_hook, with_parametrization, pruned]
    for layer, *seen in zip(layers, *run_ranks(look, 3, layers, algorithm), strict=True):
        for position, number in enumerate("02"):
            expected = consensus_weight([each.mine for each in seen], number)
            for rank, each in enumerate(seen):
                off = (each.weights[position] - expected).abs().max().item()
                assert off < 1e-6, (layer.__name__, number, rank, off)
            if layer is not pruned:
                largest = torch.linalg.matrix_norm(expected, 2).item()
                assert 0.999 < largest < 1.02, (layer.__name__, number, largest)
