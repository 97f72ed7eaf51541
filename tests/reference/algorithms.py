"""One class per row of the table; ``step`` maps all workers' x to all workers' new x.

Those whose rounds all fall on boundaries, every tau steps, say so in ``boundary``. A mean that is
launched at a boundary and used at the next is kept in ``launched`` until then.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tests.reference.vectors import Mean, mean


class Reference(Protocol):
    tau: int | None  # None: gradients are averaged, parameters never

    def start(self, x: Sequence[Tensor], named: Mapping[str, Tensor]) -> None:
        """Set z, s, W from the parameters at the end of warm-up, the same on every worker.

        ``named`` are the first worker's parameters, which say where in x each one lies.
        """

    def step(self, k: int, x: Sequence[Tensor], gamma: Tensor) -> Sequence[Tensor]:
        """Every worker's parameters after k local steps (1, 2, ...), whether or not a round is due.

        ``gamma`` holds every number's learning rate at this step.
        """


class Periodic:
    """Whatever happens, happens after every tau local steps."""

    tau: int | None
    mean: Mean = staticmethod(mean)

    def start(self, x: Sequence[Tensor], named: Mapping[str, Tensor]) -> None:
        pass

    def step(self, k: int, x: Sequence[Tensor], gamma: Tensor) -> Sequence[Tensor]:
        assert self.tau is not None
        return x if k % self.tau else self.boundary(x)

    def boundary(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Every worker's parameters after the boundary."""
        raise NotImplementedError


class AllReduce(Periodic):
    """Fully synchronous SGD."""

    tau: int | None = None


class LocalSGD(Periodic):
    """x <- mean."""

    def __init__(self, tau: int) -> None:
        self.tau: int | None = tau

    def boundary(self, x: Sequence[Tensor]) -> list[Tensor]:
        average = self.mean(x)
        return [average.clone() for _ in x]


class OverlapLocalSGD(Periodic):
    """x <- (1-alpha) x + alpha z; then v <- beta v + (mean(x) - z), z <- z + v."""

    def __init__(self, tau: int, alpha: float = 0.6, beta: float = 0.0) -> None:
        self.tau: int | None = tau
        self.alpha, self.beta = alpha, beta

    def start(self, x: Sequence[Tensor], named: Mapping[str, Tensor]) -> None:
        self.z = x[0].clone()
        self.v = torch.zeros_like(x[0])
        self.launched: Tensor | None = None

    def boundary(self, x: Sequence[Tensor]) -> list[Tensor]:
        if self.launched is not None:
            self.v = self.beta * self.v + (self.launched - self.z)
            self.z = self.z + self.v
        pulled = [(1 - self.alpha) * xi + self.alpha * self.z for xi in x]
        self.launched = self.mean(pulled)
        return pulled


class EASGD(Periodic):
    """z <- sum(alpha x + (1/m - alpha) z) with x before the pull; x <- x - alpha (x - z)."""

    def __init__(self, tau: int, alpha: float | None = None) -> None:
        self.tau: int | None = tau
        self.given_alpha = alpha

    def start(self, x: Sequence[Tensor], named: Mapping[str, Tensor]) -> None:
        self.alpha = 0.9 / len(x) if self.given_alpha is None else self.given_alpha
        self.z = x[0].clone()
        self.launched: Tensor | None = None

    def boundary(self, x: Sequence[Tensor]) -> list[Tensor]:
        m, alpha = len(x), self.alpha
        if self.launched is not None:
            self.z = self.launched
        self.launched = self.mean([m * alpha * xi + (1 - m * alpha) * self.z for xi in x])
        return [xi - alpha * (xi - self.z) for xi in x]


class CoCoDSGD(Periodic):
    """x <- z + (x - s); s <- x; then z <- mean(x)."""

    def __init__(self, tau: int) -> None:
        self.tau: int | None = tau

    def start(self, x: Sequence[Tensor], named: Mapping[str, Tensor]) -> None:
        self.s = [xi.clone() for xi in x]
        self.launched = x[0].clone()

    def boundary(self, x: Sequence[Tensor]) -> list[Tensor]:
        z = self.launched
        moved = [z + (xi - si) for xi, si in zip(x, self.s, strict=True)]
        self.s = [xi.clone() for xi in moved]
        self.launched = self.mean(moved)
        return moved


class BMUF(Periodic):
    """G <- mean - W; Delta <- eta Delta + zeta G; W <- W + Delta; x <- W or W + eta Delta.

    The next G is taken from what x was reset to.
    """

    def __init__(
        self,
        tau: int,
        eta: float | None = None,
        zeta: float = 1.0,
        nesterov: bool = False,
    ) -> None:
        self.tau: int | None = tau
        self.given_eta, self.zeta, self.nesterov = eta, zeta, nesterov

    def start(self, x: Sequence[Tensor], named: Mapping[str, Tensor]) -> None:
        self.eta = 1 - 1 / len(x) if self.given_eta is None else self.given_eta
        self.w = x[0].clone()
        self.reset_to = x[0].clone()
        self.delta = torch.zeros_like(x[0])

    def boundary(self, x: Sequence[Tensor]) -> list[Tensor]:
        g = self.mean(x) - self.reset_to
        self.delta = self.eta * self.delta + self.zeta * g
        self.w = self.w + self.delta
        self.reset_to = self.w + self.eta * self.delta if self.nesterov else self.w.clone()
        return [self.reset_to.clone() for _ in x]
