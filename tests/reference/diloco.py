"""DiLoCo, parameter by parameter: every fragment with an outer optimizer and rounds of its own."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from math import ceil

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from tests.reference.vectors import Mean, mean

Model = dict[str, Tensor]
"""One worker's parameters by name, each in its own shape."""

Fragments = int | Sequence[Sequence[str]]

NESTEROV = partial(SGD, lr=0.7, momentum=0.9, nesterov=True)
"""The outer optimizer of the paper."""


class DiLoCo:
    """Fragment p of P launches after steps ceil(p tau / P) + k tau, and lands ``delay`` later.

    At a launch: g <- mean(z - x), s <- x, and a step of the outer optimizer on z with gradient g.
    At the landing: x <- alpha x + (1 - alpha) z (blend), or x <- z + (x - s) (carry).

    Nobody looks at z between a launch and its landing, so the outer step is made at once here.
    """

    make_mean: Callable[[], Mean] = staticmethod(lambda: mean)
    """Called once for every fragment."""

    def __init__(
        self,
        tau: int,
        outer: Callable[[list[Tensor]], Optimizer] = NESTEROV,
        fragments: Fragments = 1,
        delay: int = 0,
        merge: str = "blend",
        alpha: float = 0.0,
    ) -> None:
        self.tau: int | None = tau
        self.period, self.outer, self.fragments = tau, outer, fragments
        self.delay, self.merge, self.alpha = delay, merge, alpha

    def start(self, x: Sequence[Tensor], named: Mapping[str, Tensor]) -> None:
        self.named = {name: p.detach() for name, p in named.items()}
        z = _split(x[0], self.named)
        self.parts = [
            _Part({name: z[name].clone() for name in names}, self.outer, self.make_mean())
            for names in deal(self.named, self.fragments)
        ]

    def step(self, k: int, x: Sequence[Tensor], gamma: Tensor) -> Sequence[Tensor]:
        workers = [_split(xi, self.named) for xi in x]
        for p, part in enumerate(self.parts, start=1):
            if part.lands_at == k:
                self._land(part, workers)
            since = k - ceil(p * self.period / len(self.parts))
            if since >= 0 and since % self.period == 0:
                part.launch(workers)
                part.lands_at = k + self.delay
                if self.delay == 0:
                    self._land(part, workers)
        return [_join(worker, self.named) for worker in workers]

    def _land(self, part: "_Part", workers: Sequence[Model]) -> None:
        part.lands_at = None
        for worker, s in zip(workers, part.s, strict=True):
            for name, parameter in part.z.items():
                x, z = worker[name], parameter.detach()
                if self.merge == "carry":
                    worker[name] = z + (x - s[name])
                else:
                    worker[name] = self.alpha * x + (1 - self.alpha) * z


class _Part:
    """A fragment: its z, the optimizer that steps it, and where the workers were at the launch."""

    def __init__(self, z: Model, outer: Callable[[list[Tensor]], Optimizer], mean: Mean) -> None:
        self.mean = mean
        self.z = {name: torch.nn.Parameter(value) for name, value in z.items()}
        self.optimizer = outer(list(self.z.values()))
        self.s: list[Model] = []
        self.lands_at: int | None = None

    def launch(self, workers: Sequence[Model]) -> None:
        self.s = [{name: worker[name].clone() for name in self.z} for worker in workers]
        average = self.mean(
            [
                torch.cat([(z.detach() - worker[name]).flatten() for name, z in self.z.items()])
                for worker in workers
            ]
        )
        parts = torch.split(average, [z.numel() for z in self.z.values()])
        for z, part in zip(self.z.values(), parts, strict=True):
            z.grad = part.view(z.shape).clone()
        self.optimizer.step()


def deal(named: Mapping[str, Tensor], fragments: Fragments) -> list[list[str]]:
    """The names in every fragment, in the model's order.

    By number: in turn to the fragment with the fewest numbers so far, the first of equals; but as
    long as there is one without any parameter, to the first of those. By patterns: what they match.
    Parameters without numbers are in none.
    """
    named = {name: p for name, p in named.items() if p.numel()}
    if not isinstance(fragments, int):
        return [
            [name for name in named if any(fnmatchcase(name, each) for each in patterns)]
            for patterns in fragments
        ]
    dealt: list[list[str]] = [[] for _ in range(fragments)]
    for name in named:
        empty = [names for names in dealt if not names]
        sizes = [sum(named[each].numel() for each in names) for names in dealt]
        chosen = empty[0] if empty else dealt[sizes.index(min(sizes))]
        chosen.append(name)
    return dealt


def _split(vector: Tensor, named: Mapping[str, Tensor]) -> Model:
    """Complex parameters as real ones with a last dimension of two."""
    model = {}
    parts = torch.split(vector, [p.numel() for p in named.values()])
    for (name, p), part in zip(named.items(), parts, strict=True):
        shaped = part.view(p.shape)
        if p.is_complex():
            shaped = torch.view_as_real(shaped)
        model[name] = shaped.real  # of a real tensor, itself
    return model


def _join(model: Model, named: Mapping[str, Tensor]) -> Tensor:
    return torch.cat(
        [
            (torch.view_as_complex(model[name]) if p.is_complex() else model[name]).reshape(-1)
            for name, p in named.items()
        ]
    )
