"""Overlap-Local-SGD: draw the models to an anchor that is averaged under the next tau steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from commhooks.engine.state import CommHookState
from commhooks.hyperparameters import HalfOpenUnit, Tau, Unit

__all__ = ["OverlapLocalSGD"]


@dataclass(eq=False, repr=False)
class OverlapLocalSGD(CommHookState):
    r"""Overlap-Local-SGD (Wang, Liang & Joshi, ICASSP 2020, arXiv:2002.09539).

    At a boundary, with :math:`z` as the last round left it (the paper's pullback)

    .. math:: x_i \leftarrow (1 - \alpha) x_i + \alpha z

    and a round is launched on the result. While the next ``tau`` steps compute, it ends with
    (the paper's anchor update with momentum)

    .. math::

        v \leftarrow \beta v + \Bigl(\frac{1}{m} \sum_i x_i - z\Bigr), \qquad z \leftarrow z + v

    The anchor :math:`z` starts as the parameters at the end of warm-up, :math:`v` as zero.

    Extra memory: 1 model for ``beta=0``, where the all-reduced vector is the anchor, else 3.
    Payload of a round: 1 model.

    Args:
        tau: steps from one boundary to the next; a round has as long to be hidden.
        alpha: pull towards the anchor, in [0, 1]. The paper uses 0.6.
        beta: momentum of the anchor, in [0, 1). The paper uses 0.7.
    """

    tau: Tau
    alpha: Unit = 0.6
    beta: HalfOpenUnit = 0.0

    overlapped = True

    @property
    def vectors(self) -> tuple[str, ...]:
        """With momentum z and v; without, the mean itself is z and stays in the wire."""
        return ("z", "v") if self.beta else ()

    @property
    def reference(self) -> str:
        """The anchor."""
        return "z" if self.beta else "wire"

    def rate_factor(self, m: int) -> float:
        """A boundary takes back a part of what was learnt: alpha, and less with momentum.

        If every round adds g to the models, they settle at a speed V at which the pull takes back
        as much as it did: (1 - alpha + alpha (1 - beta)) V = (1 - alpha) g. With alpha = 1 nothing
        is learnt at any rate.
        """
        if self.alpha == 1:
            return 1.0
        return 1.0 + self.alpha * (1 - self.beta) / (1 - self.alpha)

    @property
    def weight_of_x(self) -> float:
        """1 - alpha."""
        return 1 - self.alpha

    def start(
        self,
        *,
        x: Tensor,
        wire: Tensor,
        z: Tensor | None = None,
        v: Tensor | None = None,
    ) -> None:
        """z <- x; v <- 0."""
        (wire if z is None else z).copy_(x)
        if v is not None:
            v.zero_()

    def mix(
        self,
        *,
        x: Tensor,
        wire: Tensor,
        z: Tensor | None = None,
        v: Tensor | None = None,
    ) -> None:
        """x <- (1 - alpha) x + alpha z."""
        x.lerp_(wire if z is None else z, self.alpha)

    def contribute(
        self,
        *,
        x: Tensor,
        wire: Tensor,
        z: Tensor | None = None,
        v: Tensor | None = None,
    ) -> None:
        """The mean is that of the models after the pull."""
        wire.copy_(x)

    def chain(self, *, wire: Tensor, z: Tensor | None = None, v: Tensor | None = None) -> None:
        """v <- beta v + (mean - z); z <- z + v."""
        if z is not None and v is not None:
            v.mul_(self.beta).add_(wire.sub_(z))
            z.add_(v)
