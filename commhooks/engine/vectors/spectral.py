"""Spectral norm in the consensus: u and v that belong to the mean of the weights.

``torch.nn.utils.spectral_norm``, the old one and the parametrisation, divides a weight W by
u^T W v. Its buffers u and v follow W slowly, by one power iteration a forward in training mode, and
not at all in evaluation mode. Those of one rank belong to that rank's W, and not to the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from commhooks.engine.vectors.buffers import write

__all__ = ["SpectralPair", "find_spectral"]

# Vectors of a Krylov space; with more, none is gained from one restart to the next.
_KRYLOV = 32
_RESTARTS = 20
# Of the largest singular value; fp32 resolves little more.
_GAIN = 1e-6


@dataclass(frozen=True)
class SpectralPair:
    """The two buffers of one spectral norm.

    Attributes:
        u, v: the buffers, as long as W is high, and as it is wide.
        weight: gives W, a matrix.
    """

    u: Tensor
    v: Tensor
    weight: Callable[[], Tensor]

    def fit(self) -> None:
        """Make u and v the singular vectors of the largest singular value of W as it is now."""
        with torch.no_grad():
            u, v = _leading(self.weight().double())
        write(self.u, u)
        write(self.v, v)


def find_spectral(model: nn.Module) -> Iterator[SpectralPair]:
    """The spectral norms of a model, in the order of its modules."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                yield _of_hook(hook, module)
        if parametrize.is_parametrized(module):
            for listed in module.parametrizations.values():  # type: ignore[operator]
                for place, one in enumerate(listed):
                    if isinstance(one, _SpectralNorm) and hasattr(one, "_u"):
                        yield _of_parametrisation(one, listed, place)


def _of_hook(hook: SpectralNorm, module: nn.Module) -> SpectralPair:
    u, v, weight = (getattr(module, f"{hook.name}_{part}") for part in ("u", "v", "orig"))
    return SpectralPair(u, v, lambda: hook.reshape_weight_to_matrix(weight))


def _of_parametrisation(
    one: _SpectralNorm, listed: parametrize.ParametrizationList, place: int
) -> SpectralPair:
    def weight() -> Tensor:
        # What those before it make of the parameter, or, as weight norm does, of several.
        several = [] if listed.is_tensor else range(listed.ntensors)
        made = [getattr(listed, f"original{number}") for number in several] or [listed.original]
        for earlier in list(listed)[:place]:
            made = [earlier(*made)]
        return one._reshape_weight_to_matrix(*made)

    return SpectralPair(one._u, one._v, weight)


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The singular vectors of a matrix's largest singular value.

    Of the matrix on Krylov spaces, which need no gap between singular values as power iterations
    do. They begin from noise: what belongs to another weight may have nothing of the right vector.
    """
    columns = matrix.shape[1]
    random = torch.Generator().manual_seed(0)
    start = torch.randn(columns, generator=random, dtype=torch.float64, device="cpu")
    start = start.to(matrix.device)
    u, largest = matrix.new_zeros(len(matrix)), 0.0
    for _ in range(_RESTARTS):
        basis = matrix.new_zeros(min(_KRYLOV, columns), columns)
        basis[0] = start / start.norm()
        for size in range(1, len(basis)):
            following = matrix.T @ (matrix @ basis[size - 1])
            length = following.norm()
            for _ in range(2):
                following -= basis[:size].T @ (basis[:size] @ following)
            if following.norm() <= 1e-12 * length:
                basis = basis[:size]
                break
            basis[size] = following / following.norm()
        left, values, right = torch.linalg.svd(matrix @ basis.T, full_matrices=False)
        u, start = left[:, 0], right[0] @ basis
        if values[0] <= largest * (1 + _GAIN):
            break
        largest = float(values[0])
    return u, start
