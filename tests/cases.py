"""One training run as plain values, so that ranks and the reference run the same."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from tests import reference
from tests.workload import (
    TINY_CAP_MB,
    Backward,
    MakeModel,
    MakeOptimizers,
    adamw,
    gradient,
    nesterov_sgd,
    ragged_model,
)

ALGORITHMS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "AllReduce": ({},),
    "LocalSGD": ({},),
    "OverlapLocalSGD": ({}, {"alpha": 0.5, "beta": 0.7}),
    "EASGD": ({}, {"alpha": 0.3}),
    "CoCoDSGD": ({},),
    "BMUF": ({}, {"eta": 0.4, "zeta": 0.8, "nesterov": True}),
    "DiLoCo": (
        {},
        {
            "outer": partial(SGD, lr=0.6, momentum=0.7),
            "fragments": 2,
            "delay": 1,
            "merge": "carry",
        },
    ),
    "SlowMo": ({}, {"beta": 0.7, "lr": 0.8}),
}
"""Each algorithm's names of class and hyper-parameters, besides tau; the first are the defaults."""

PERIODIC = tuple(name for name in ALGORITHMS if name != "AllReduce")
BLOCKING = ("LocalSGD", "BMUF", "DiLoCo", "SlowMo")
OVERLAPPED = ("OverlapLocalSGD", "EASGD", "CoCoDSGD")


@dataclass(frozen=True)
class Case:
    """``arguments`` are what both the library's class and the reference's take."""

    algorithm: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    warmup_steps: int = 0
    optimizers: MakeOptimizers = nesterov_sgd
    dtype: torch.dtype = torch.float32
    steps: int = 12
    model: MakeModel = ragged_model
    backward: Backward = gradient
    ddp: Mapping[str, Any] = field(default_factory=dict)
    island: int = 1
    compression: str | None = None
    cap_mb: float = TINY_CAP_MB

    def __str__(self) -> str:
        arguments = "-".join(f"{name}={value}" for name, value in self.arguments.items())
        dtype = str(self.dtype).removeprefix("torch.")
        warmup = f"warmup={self.warmup_steps}"
        return f"{self.algorithm}-{arguments}-{warmup}-{self.optimizers.__name__}-{dtype}"

    @property
    def tau(self) -> int:
        return int(self.arguments.get("tau", 1))

    @property
    def fragments(self) -> int:
        given = self.arguments.get("fragments", 1)
        return given if isinstance(given, int) else len(given)

    def rounds(self, k: int) -> int:
        """How many rounds are launched within k local steps; every fragment has its own."""
        offsets = [-(-p * self.tau // self.fragments) for p in range(1, self.fragments + 1)]
        return sum((k - offset) // self.tau + 1 for offset in offsets if k >= offset)

    @property
    def tolerance(self) -> float:
        exact = 1e-12 if self.dtype == torch.float64 else 1e-6
        # Rounding to few bits multiplies what the last bits of a sum leave.
        return 10 * exact if self.compression else exact

    @property
    def keywords(self) -> dict[str, Any]:
        """What only the library's class takes."""
        return {
            "warmup_steps": self.warmup_steps,
            "bucket_cap_mb": self.cap_mb,
            "compression": self.compression,
            "island": None if self.island == 1 else self.island,
        }

    def worker_backward(self, model: nn.Module, worker: int, step: int) -> None:
        """The mean of the gradients of an island's ranks."""
        for rank in range(worker * self.island, (worker + 1) * self.island):
            self.backward(model, rank, step)
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= self.island

    def reference(self) -> reference.Reference:
        made: reference.Reference = getattr(reference, self.algorithm)(**self.arguments)
        return made


def with_tau(algorithm: str, tau: int) -> Iterator[dict[str, Any]]:
    """Every choice of hyper-parameters of ``algorithm``, at this ``tau`` where it has one."""
    for arguments in ALGORITHMS[algorithm]:
        yield dict(arguments) if algorithm == "AllReduce" else {"tau": tau, **arguments}


def of_every_algorithm(
    times: Iterable[tuple[int, int]], algorithms: Iterable[str] = ALGORITHMS, **settings: Any
) -> Iterator[Case]:
    """Every choice of hyper-parameters at each tau and warm-up, each past its third boundary."""
    for algorithm, (tau, warmup_steps) in itertools.product(algorithms, times):
        for arguments in with_tau(algorithm, tau):
            yield Case(
                algorithm,
                arguments,
                warmup_steps,
                adamw if warmup_steps else nesterov_sgd,
                steps=warmup_steps + 3 * tau + 2,
                **settings,
            )


def one_case(algorithm: str, tau: int, **settings: Any) -> Case:
    """``algorithm`` with its default hyper-parameters."""
    return Case(algorithm, next(with_tau(algorithm, tau)), **settings)


def two_cases(**settings: Any) -> list[Case]:
    """A blocking and an overlapped algorithm, for what does not depend on the algorithm."""
    return [
        Case("LocalSGD", {"tau": 2}, **settings),
        Case("OverlapLocalSGD", {"tau": 3, "alpha": 0.5, "beta": 0.7}, **settings),
    ]
