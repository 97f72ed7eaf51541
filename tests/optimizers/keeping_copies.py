"""Small optimizers of the kinds that keep weights of their own, as real libraries have them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


class MastersInState(Optimizer):
    """Mixed precision: a wider copy of every parameter is updated and rounded into it."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["master"] = p.detach().clone().to(wider(p.dtype))
                state["master"].sub_(p.grad, alpha=group["lr"])
                p.copy_(state["master"])


class MastersInAList(Optimizer):
    """The same, in a list of its own from the start, as Apex and Megatron keep them."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})
        self.masters = [
            [p.detach().clone().to(wider(p.dtype)) for p in group["params"]]
            for group in self.param_groups
        ]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, masters in zip(self.param_groups, self.masters, strict=True):
            for p, master in zip(group["params"], masters, strict=True):
                if p.grad is not None:
                    master.sub_(p.grad, alpha=group["lr"])
                    p.copy_(master)


class Lookahead(Optimizer):
    """Zhang et al. 2019: slow weights, which every second step resets the fast ones to."""

    def __init__(self, inner: Optimizer, k: int = 2, alpha: float = 0.5) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.k, self.alpha, self.count = inner, k, alpha, 0
        self.slow = [p.detach().clone() for group in inner.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        self.count += 1
        if self.count % self.k == 0:
            fast = [p for group in self.param_groups for p in group["params"]]
            for slow, p in zip(self.slow, fast, strict=True):
                slow.lerp_(p, self.alpha)
                p.copy_(slow)


class ScheduleFree(Optimizer):
    """Defazio et al. 2024: the parameters are y; z is kept, and train() and eval() swap."""

    def __init__(self, params: Any, lr: float = 0.05, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": True})

    @torch.no_grad()
    def eval(self) -> None:
        self._swap(lambda beta: 1 - 1 / beta, train_mode=False)

    @torch.no_grad()
    def train(self) -> None:
        self._swap(lambda beta: 1 - beta, train_mode=True)

    def _swap(self, weight: Any, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] is not train_mode:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight(group["beta"]))
                group["train_mode"] = train_mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                z: Tensor = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(z, 1 / group["k"])
                p.sub_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - 1 / group["k"]) - 1))
                z.sub_(p.grad, alpha=group["lr"])


class FromTheStart(Optimizer):
    """As Prodigy: p0 is what the parameters were before the first step, and only measured from.

    Args:
        rates: the learning rates of the first steps; the last one stays.
    """

    def __init__(self, params: Any, rates: Sequence[float]) -> None:
        super().__init__(params, {})
        self.rates, self.count, self.distance = rates, 0, 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        rate = self.rates[min(self.count, len(self.rates) - 1)]
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    start = self.start_of(p)
                    self.distance = max(self.distance, float((p - start).norm()))
                    p.sub_(p.grad, alpha=rate)

    def start_of(self, p: Tensor) -> Tensor:
        start: Tensor = self.state[p].setdefault("p0", p.detach().clone())
        return start


class FromAList(FromTheStart):
    """As DoG: in a list of the group's, made at once."""

    def __init__(self, params: Any, rates: Sequence[float]) -> None:
        super().__init__(params, rates)
        for group in self.param_groups:
            group["init_buffer"] = [p.detach().clone() for p in group["params"]]

    def start_of(self, p: Tensor) -> Tensor:
        found: Tensor = next(
            start
            for group in self.param_groups
            for each, start in zip(group["params"], group["init_buffer"], strict=True)
            if each is p
        )
        return found


class DAdaptSGD(Optimizer):
    """Dual averaging, as D-Adaptation's optimizer of this name with momentum."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["x0"], state["s"] = p.detach().clone(), torch.zeros_like(p)
                state["s"].add_(p.grad, alpha=group["lr"])
                p.mul_(0.9).add_(state["x0"] - state["s"], alpha=0.1)


class LateMasters(MastersInState):
    """Masters, and a learning rate of 0 for longer than the search would take."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            group["lr"] = 0.05 if group["steps"] > 12 else 0.0
        super().step(closure)


def wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32


def lookahead(params: Any) -> Lookahead:
    return Lookahead(SGD(params, lr=0.05))
