"""SlowMo: slow momentum on the mean of the models, exact under a learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from commhooks.engine.rules import Part
from commhooks.engine.state import CommHookState
from commhooks.hyperparameters import HalfOpenUnit, Positive, Tau

__all__ = ["SlowMo"]


@dataclass(eq=False, repr=False)
class SlowMo(CommHookState):
    r"""Slow momentum on Local SGD (Wang, Tantia, Ballas & Rabbat, ICLR 2020, arXiv:1910.00643).

    At a boundary, with a blocking all-reduce and the inner learning rate :math:`\gamma` in force,
    the mean over the workers where theirs differ (paper, Algorithm 1):

    .. math::

        u &\leftarrow \beta u + \frac{1}{\gamma} \Bigl(z - \frac{1}{m} \sum_i x_i\Bigr) \\
        z &\leftarrow z - \mathrm{lr}\, \gamma u \\
        x_i &\leftarrow z

    :math:`z` starts as the parameters at the end of warm-up, :math:`u` as zero. What is kept is
    :math:`v = \gamma u`, in units of parameters: with a constant learning rate :math:`\gamma`
    cancels, and a schedule rescales :math:`v`, parameter by parameter.

    Extra memory: 3 models. Payload of a round: 1 model. With ``beta=0, lr=1`` it is Local SGD.

    Args:
        tau: steps from one boundary to the next.
        beta: slow momentum, in [0, 1). The paper uses 0.5 to 0.8.
        lr: slow learning rate, above 0. The paper uses 1.
    """

    tau: Tau
    beta: HalfOpenUnit = 0.5
    lr: Positive = 1.0

    @property
    def vectors(self) -> tuple[str, ...]:
        """The global model and the slow momentum, in units of parameters."""
        return ("z", "v")

    @property
    def reference(self) -> str:
        """The global model."""
        return "z"

    def start(self, *, x: Tensor, wire: Tensor, z: Tensor, v: Tensor) -> None:
        """z <- x; v <- 0."""
        z.copy_(x)
        v.zero_()

    def prepare(self, parts: Sequence[Part]) -> None:
        """v = gamma u, for the gamma of now."""
        for part in parts:
            part.vectors["v"].mul_(part.rate_change)

    def chain(self, *, wire: Tensor, z: Tensor, v: Tensor) -> None:
        """v <- beta v + (z - mean); z <- z - lr v."""
        v.mul_(self.beta).add_(torch.sub(z, wire, out=wire))
        z.sub_(v, alpha=self.lr)

    def mix(self, *, x: Tensor, wire: Tensor, z: Tensor, v: Tensor) -> None:
        """x <- z."""
        x.copy_(z)
