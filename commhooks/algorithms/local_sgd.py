"""Local SGD: average the models every tau steps, and wait."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from commhooks.engine.state import CommHookState
from commhooks.hyperparameters import Tau

__all__ = ["LocalSGD"]


@dataclass(eq=False, repr=False)
class LocalSGD(CommHookState):
    r"""Local SGD (Stich, ICLR 2019; Yu et al., AAAI 2019; Wang & Joshi, 2018).

    At a boundary, with a blocking all-reduce:

    .. math:: x_i \leftarrow \frac{1}{m} \sum_j x_j

    Extra memory: 1 model. Payload of a round: 1 model. With ``tau=1`` and plain SGD it is DDP.

    Args:
        tau: steps from one averaging to the next.
    """

    tau: Tau

    def start(self, *, x: Tensor, wire: Tensor) -> None:
        """The wire holds the last mean, until the next launch."""
        wire.copy_(x)

    def mix(self, *, x: Tensor, wire: Tensor) -> None:
        """x <- mean."""
        x.copy_(wire)
