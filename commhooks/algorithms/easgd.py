"""EASGD: models and a centre that pull at each other, the centre averaged in the background."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from commhooks.engine.state import CommHookState
from commhooks.hyperparameters import Tau, Unit

__all__ = ["EASGD"]


@dataclass(eq=False, repr=False)
class EASGD(CommHookState):
    r"""Elastic averaging SGD (Zhang, Choromanska & LeCun, NeurIPS 2015), overlapped.

    At a boundary (paper, eq. 5 and 6, with the gradient part done by the optimizer)

    .. math:: x_i \leftarrow x_i - \alpha (x_i - z)

    and, from the same :math:`x_i` as before the pull, while the next ``tau`` steps compute

    .. math:: z \leftarrow (1 - m \alpha) z + \alpha \sum_i x_i

    The centre :math:`z` starts as the parameters at the end of warm-up.

    Extra memory: 1 model. Payload of a round: 1 model.

    Args:
        tau: steps from one boundary to the next; a round has as long to be hidden.
        alpha: elastic pull, in [0, 1]; None means 0.9 / m for m workers (the paper's beta = 0.9).
    """

    tau: Tau
    alpha: Unit | None = None

    overlapped = True

    def resolve(self, m: int) -> None:
        """Fix alpha for ``m`` workers."""
        self._m = m
        self._alpha = 0.9 / m if self.alpha is None else self.alpha

    def rate_factor(self, m: int) -> float:
        """Workers and centre pull at each other, and only m of the m + 1 of them make steps."""
        return (m + 1) / m

    @property
    def weight_of_x(self) -> float:
        """1 - alpha."""
        return 1 - self._alpha

    def start(self, *, x: Tensor, wire: Tensor) -> None:
        """z <- x; the wire holds z between rounds."""
        wire.copy_(x)

    def mix(self, *, x: Tensor, wire: Tensor) -> None:
        """x <- x - alpha (x - z); leaves z - x, x before the pull, in the wire."""
        x.add_(wire.sub_(x), alpha=self._alpha)

    def contribute(self, *, x: Tensor, wire: Tensor) -> None:
        """(1 - m alpha) z + m alpha x, x before the pull, whose mean over ranks is the next z.

        With d = z - x in the wire and x' = x + alpha d that is x' + (1 - alpha - m alpha) d.
        """
        wire.mul_(1.0 - (1 + self._m) * self._alpha).add_(x)
