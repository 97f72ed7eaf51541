"""BMUF: block momentum on the mean of the models."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from commhooks.engine.state import CommHookState
from commhooks.hyperparameters import Flag, HalfOpenUnit, Positive, Tau

__all__ = ["BMUF"]


@dataclass(eq=False, repr=False)
class BMUF(CommHookState):
    r"""Blockwise model-update filtering (Chen & Huo, ICASSP 2016).

    At a boundary, with a blocking all-reduce (paper, Section 2):

    .. math::

        G &= \frac{1}{m} \sum_i x_i - W \\
        \Delta &\leftarrow \eta \Delta + \zeta G \\
        W &\leftarrow W + \Delta \\
        x_i &\leftarrow W \quad\text{(classical), or} \\
        x_i &\leftarrow W + \eta \Delta \quad\text{(Nesterov)}

    In the Nesterov form the next :math:`G` is taken from what :math:`x_i` was reset to.
    :math:`W` starts as the parameters at the end of warm-up, :math:`\Delta` as zero.

    Extra memory: 3 models. Payload of a round: 1 model. With ``eta=0, zeta=1`` it is Local SGD.

    Args:
        tau: steps in a block.
        eta: block momentum, in [0, 1); None means 1 - 1 / m for m workers.
        zeta: block learning rate, above 0.
        nesterov: whether the models restart ahead of W, at W + eta Delta.
    """

    tau: Tau
    eta: HalfOpenUnit | None = None
    zeta: Positive = 1.0
    nesterov: Flag = False

    def resolve(self, m: int) -> None:
        """Fix eta for ``m`` workers."""
        self._eta = 1.0 - 1.0 / m if self.eta is None else self.eta

    def rate_factor(self, m: int) -> float:
        """Block momentum repeats a block's update: zeta / (1 - eta) times in all."""
        eta = 1.0 - 1.0 / m if self.eta is None else self.eta
        return (1.0 - eta) / self.zeta

    @property
    def vectors(self) -> tuple[str, ...]:
        """The global model and its filtered update."""
        return ("W", "Delta")

    @property
    def reference(self) -> str:
        """The global model."""
        return "W"

    def start(self, *, x: Tensor, wire: Tensor, W: Tensor, Delta: Tensor) -> None:
        """W <- x; Delta <- 0."""
        W.copy_(x)
        Delta.zero_()

    def chain(self, *, wire: Tensor, W: Tensor, Delta: Tensor) -> None:
        """G <- mean - what x was reset to; Delta <- eta Delta + zeta G; W <- W + Delta."""
        G = wire.sub_(W)
        if self.nesterov:
            G.sub_(Delta, alpha=self._eta)
        Delta.mul_(self._eta).add_(G, alpha=self.zeta)
        W.add_(Delta)

    def mix(self, *, x: Tensor, wire: Tensor, W: Tensor, Delta: Tensor) -> None:
        """x <- W, or W + eta Delta."""
        x.copy_(W)
        if self.nesterov:
            x.add_(Delta, alpha=self._eta)
