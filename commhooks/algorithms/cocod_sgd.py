"""CoCoD-SGD: go on from the mean of where the models were, plus one's own steps since."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from commhooks.engine.state import CommHookState
from commhooks.hyperparameters import Tau

__all__ = ["CoCoDSGD"]


@dataclass(eq=False, repr=False)
class CoCoDSGD(CommHookState):
    r"""CoCoD-SGD, computation and communication decoupled (Shen et al., IJCAI 2019).

    At a boundary, with :math:`s_i` the model this rank had at the last one and :math:`z` the mean
    of those (paper, Algorithm 1)

    .. math:: x_i \leftarrow z + (x_i - s_i), \qquad s_i \leftarrow x_i

    and, while the next ``tau`` steps compute,

    .. math:: z \leftarrow \frac{1}{m} \sum_i x_i

    The first boundary leaves the models as they are, since there was no round before.

    Extra memory: 2 models. Payload of a round: 1 model.

    Args:
        tau: steps from one boundary to the next; a round has as long to be hidden.
    """

    tau: Tau

    overlapped = True
    portable = False  # s is where this rank was

    @property
    def vectors(self) -> tuple[str, ...]:
        """s; the wire holds z between rounds."""
        return ("s",)

    @property
    def weight_of_x(self) -> float:
        """x keeps all of itself, and z - s is added."""
        return 1.0

    def start(self, *, x: Tensor, wire: Tensor, s: Tensor) -> None:
        """z <- x; s <- x."""
        wire.copy_(x)
        s.copy_(x)

    def mix(self, *, x: Tensor, wire: Tensor, s: Tensor) -> None:
        """x <- z + (x - s), as x + (z - s), which is exact where z = s."""
        x.add_(wire.sub_(s))

    def contribute(self, *, x: Tensor, wire: Tensor, s: Tensor) -> None:
        """s <- x; the next z is the mean of x."""
        s.copy_(x)
        wire.copy_(x)
