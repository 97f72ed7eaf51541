"""A rank that trains through Accelerate, among the harness's processes."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

import commhooks.accelerate
from tests.cases import Case
from tests.reference import flat
from tests.training import make_state
from tests.workload import initialise, loss, trained


def normed_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """With BatchNorm, whose buffers are each rank's own."""
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))
    return initialise(model).to(dtype)


class TiedModel(nn.Module):
    """Two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.last(self.second(self.first(x)))
        return last


def tied_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return initialise(TiedModel()).to(dtype)


def normed(case: Case) -> Case:
    return replace(case, model=normed_model)


@dataclass(frozen=True)
class Scaling:
    """A GradScaler in Accelerate's hands, and the steps at which a rank's gradients overflow."""

    overflows: dict[int, list[int]]

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)


def rank_environment() -> None:
    """What a launcher would have told this rank."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ["OMP_NUM_THREADS"] = "1"  # which Accelerate would raise


class Accelerated:
    """The model, optimizers, scheduler and state of one rank, as a recipe would set them up."""

    def __init__(self, case: Case, scaling: Scaling | None = None) -> None:
        self.case, self.rank, self.steps = case, dist.get_rank(), 0
        self.scaling = scaling
        rank_environment()
        from accelerate import Accelerator  # slow, and not every rank's business

        self.accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
        assert self.accelerator.num_processes == dist.get_world_size()
        if scaling is not None:
            # Accelerate makes one only for fp16 on a GPU; the rest of it does not care.
            self.accelerator.scaler = scaling.scaler()
        model = case.model(case.dtype)
        optimizers = case.optimizers(model)
        self.model, *prepared = self.accelerator.prepare(
            model, *optimizers, *(ExponentialLR(each, 0.9) for each in optimizers)
        )
        self.optimizers = prepared[: len(optimizers)]
        self.schedulers = prepared[len(optimizers) :]
        self.state = make_state(case)
        self.state.register(self.model, *self.optimizers, scaler=self.accelerator.scaler)
        commhooks.accelerate.checkpoint(self.accelerator, self.state)

    @property
    def x(self) -> Tensor:
        """Parameters and buffers."""
        values = [*trained(self.model), *(b.float() for b in self.model.buffers())]
        return flat(values)

    def step(self, after_optimizers: Callable[[], object] = lambda: None) -> Tensor:
        self.steps += 1
        value = loss(self.model, self.rank, self.steps)
        if self.scaling is not None and self.steps in self.scaling.overflows.get(self.rank, []):
            value = value * float("inf")
        self.accelerator.backward(value)
        for optimizer in self.optimizers:
            optimizer.step()
        after_optimizers()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for scheduler in self.schedulers:
            scheduler.step()
        return self.x

    def go_on_from(self, folder: str, step: int) -> None:
        self.accelerator.load_state(folder)
        self.steps = step
