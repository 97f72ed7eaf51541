"""SlowMo in the paper's own form: what is remembered, u, is in units of gradients."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tests.reference.vectors import Mean, mean


class SlowMo:
    """u <- beta u + (z - mean) / gamma; z <- z - lr gamma u; x <- z, every tau steps.

    gamma is the inner learning rate of the step that has just been made. Where it is 0, nothing has
    been learnt in that step, and u is only shrunk.
    """

    mean: Mean = staticmethod(mean)

    def __init__(self, tau: int, beta: float = 0.5, lr: float = 1.0) -> None:
        self.tau: int | None = tau
        self.beta, self.lr = beta, lr

    def start(self, x: Sequence[Tensor], named: Mapping[str, Tensor]) -> None:
        self.z = x[0].clone()
        self.u = torch.zeros_like(x[0])

    def step(self, k: int, x: Sequence[Tensor], gamma: Tensor) -> Sequence[Tensor]:
        assert self.tau is not None
        if k % self.tau:
            return x
        gamma = gamma.to(self.z.real.dtype)
        learnt = torch.where(gamma > 0, (self.z - self.mean(x)) / gamma, 0)
        self.u = self.beta * self.u + learnt
        self.z = self.z - self.lr * gamma * self.u
        return [self.z.clone() for _ in x]
