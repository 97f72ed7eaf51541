"""m workers in one process: each its own model and optimizer, one `Reference` over them all."""

import copy
import statistics
from collections.abc import Callable, Container, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.reference.algorithms import Reference
from tests.reference.compression import Compressed
from tests.reference.vectors import flat, mean, write


class Workers:
    """Steps all workers together; ``x`` holds every worker's parameters after the step.

    ``gradient(model, rank, step)`` leaves worker ``rank``'s gradient of ``step`` (1, 2, ...) in
    ``model``. Only parameters that require gradients take part; half-precision ones are averaged in
    fp32.
    """

    def __init__(
        self,
        algorithm: Reference,
        model: nn.Module,
        optimizer: Callable[[nn.Module], Sequence[Optimizer]],
        size: int,
        warmup_steps: int = 0,
        compression: str | None = None,
    ) -> None:
        self.algorithm, self.warmup_steps = algorithm, warmup_steps
        self.compression = compression
        self.models = [copy.deepcopy(model) for _ in range(size)]
        self.optimizers = [optimizer(each) for each in self.models]
        self.steps = 0
        self.boundary_run = False
        self.started_at = warmup_steps
        if warmup_steps == 0:
            self._start()

    @property
    def x(self) -> list[Tensor]:
        return [_widened(flat(_trained(model))) for model in self.models]

    @property
    def consensus(self) -> Tensor:
        return mean(self.x)

    @property
    def gamma(self) -> Tensor:
        """The learning rate of every number in x, the mean of the workers'."""
        rates = {
            id(p): float(group["lr"])
            for optimizer in self.all_optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        ours = zip(*map(_trained, self.models), strict=True)
        return torch.cat(
            [
                torch.full(
                    (same[0].numel(),),
                    statistics.mean(rates.get(id(p), 0.0) for p in same),
                    dtype=torch.float64,
                )
                for same in ours
            ]
        )

    @property
    def all_optimizers(self) -> list[Optimizer]:
        return [optimizer for optimizers in self.optimizers for optimizer in optimizers]

    def step(
        self,
        gradient: Callable[[nn.Module, int, int], object],
        skipped: Container[tuple[int, int]] = (),
    ) -> list[Tensor]:
        """One step of every worker, without the optimizers of a ``(rank, step)`` in ``skipped``."""
        self.backward(gradient)
        for number in range(len(self.optimizers[0])):
            self.optimize(number, skipped)
        return self.end_step()

    # A step in its parts, for loops that do something between them.

    def backward(self, gradient: Callable[[nn.Module, int, int], object]) -> None:
        """Everybody's gradients of the next step; in warm-up their mean."""
        self.steps += 1
        self.boundary_run = False
        for rank, model in enumerate(self.models):
            model.zero_grad()
            gradient(model, rank, self.steps)
        if self.algorithm.tau is None or self.steps <= self.warmup_steps:
            self._average_gradients()

    def optimize(self, number: int, skipped: Container[tuple[int, int]] = ()) -> None:
        """Everybody's ``number``-th optimizer, but for those who skip this step."""
        for rank, optimizers in enumerate(self.optimizers):
            if (rank, self.steps) not in skipped:
                optimizers[number].step()

    def run_due_boundary(self) -> None:
        """What an evaluation or a checkpoint between the parts of a step begins with."""
        local = self.algorithm.tau is not None and self.steps > self.started_at
        if local and not self.boundary_run:
            k = self.steps - self.started_at
            self._assign(self.algorithm.step(k, self.x, self.gamma))
            self.boundary_run = True

    def end_step(self) -> list[Tensor]:
        """The end of warm-up or a boundary, if this step is one; everybody's parameters."""
        if self.steps == self.warmup_steps:
            self._start()
        else:
            self.run_due_boundary()
        return self.x

    def finish(self) -> Tensor:
        """Everybody on the consensus, where the algorithm starts anew."""
        consensus = self.consensus
        self._assign([consensus for _ in self.models])
        if self.steps >= self.warmup_steps:
            self.started_at = self.steps
            self._start()
        return consensus

    def _start(self) -> None:
        if self.compression is not None:
            kind, x = self.compression, self.x[0]
            # Of those that average models, and of DiLoCo, which averages differences.
            self.algorithm.mean = Compressed(kind, x.clone())  # type: ignore[attr-defined]
            self.algorithm.make_mean = lambda: Compressed(kind, None)  # type: ignore[attr-defined]
        self.algorithm.start(self.x, _named(self.models[0]))

    def _assign(self, x: Sequence[Tensor]) -> None:
        for model, xi in zip(self.models, x, strict=True):
            write(xi, _trained(model))

    def _average_gradients(self) -> None:
        """The mean over workers; one without a gradient adds zero, unless nobody has any."""
        for same in zip(*(_trained(model) for model in self.models), strict=True):
            if any(p.grad is not None for p in same):
                average = mean([torch.zeros_like(p) if p.grad is None else p.grad for p in same])
                for p in same:
                    p.grad = average.clone()


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _trained(model: nn.Module) -> list[Tensor]:
    return list(_named(model).values())


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
