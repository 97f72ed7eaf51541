"""Pins that an optimizer is refused that shares its updates between workers.

The Muon that is published for clusters updates every m-th matrix on its rank and gathers the rest.
With local gradients each matrix would be trained on one rank's data alone, and no gap would tell.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import commhooks
from commhooks.engine.steps import shared_updates
from tests.cases import Case
from tests.harness import run_ranks
from tests.heard import heard
from tests.training import Form, Trainer
from tests.workload import initialise, ragged_model, trained

Kind = Callable[..., Optimizer]


class ClusterMuon(Optimizer):
    """Every rank orthogonalises some of the matrices, and sends what it has made of them."""

    def __init__(self, params: Any, lr: float = 0.02, group: Any = None) -> None:
        super().__init__(params, {"lr": lr})
        self._group = group

    def params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    def update(self) -> None:
        size, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        lr = self.param_groups[0]["lr"]
        padded = self.params() + [torch.empty_like(self.params()[-1])] * (size - 1)
        for first in range(0, len(self.params()), size):
            mine = padded[first + rank]
            if first + rank < len(self.params()) and mine.grad is not None:
                u, _, v = torch.linalg.svd(mine.grad, full_matrices=False)
                mine.sub_(lr * (u @ v))
            for source in range(size):
                if first + source < len(self.params()):
                    dist.broadcast(padded[first + source], group_src=source, group=self._group)


class MuonWithAdam(ClusterMuon):
    """The matrices shared, everything else local, in one optimizer."""

    def params(self) -> list[Tensor]:
        return [p for p in super().params() if p.ndim == 2]

    def update(self) -> None:
        super().update()
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2 and p.grad is not None:
                    p.sub_(group["lr"] * p.grad.sign())


class ReducedMuon(ClusterMuon):
    """Updates of all matrices travel in one flat vector."""

    def update(self) -> None:
        size, rank = dist.get_world_size(), dist.get_rank()
        flat = torch.cat([p.grad.flatten() for p in self.params() if p.grad is not None])
        owner = torch.arange(flat.numel()) * size // flat.numel()
        flat *= owner == rank
        dist.all_reduce(flat)
        sizes = [p.numel() for p in self.params()]
        for p, u in zip(self.params(), torch.split(flat, sizes), strict=True):
            p.sub_(self.param_groups[0]["lr"] * u.view_as(p))


class ReducedGradients(SGD):
    """Reduces the gradients by itself, in place."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                dist.all_reduce(p.grad)
        return super().step(closure)


def matrices(model: nn.Module) -> list[Tensor]:
    return [p for p in trained(model) if p.ndim == 2]


def vectors(model: nn.Module) -> list[Tensor]:
    return [p for p in trained(model) if p.ndim < 2]


def cluster_and_adam(model: nn.Module) -> list[Optimizer]:
    return [ClusterMuon(matrices(model)), AdamW(vectors(model), lr=0.01)]


def in_one(kind: Kind) -> Callable[[nn.Module], list[Optimizer]]:
    return partial(_in_one, kind)


def _in_one(kind: Kind, model: nn.Module) -> list[Optimizer]:
    return [kind(trained(model), lr=0.05)]


def reduced_matrices(model: nn.Module) -> list[Optimizer]:
    return [SGD(vectors(model), lr=0.05), ReducedMuon(matrices(model))]


SHARING = {
    "cluster": cluster_and_adam,
    "mixed": in_one(MuonWithAdam),
    "flat": reduced_matrices,
    "gradients": in_one(ReducedGradients),
}


def steps_until_refused(case: Case, form: Form, warmed_up: bool, closure: bool) -> tuple[int, str]:
    trainer = Trainer(case, form)
    rates = [
        LambdaLR(each, lambda step: min(1.0, step / 4)) for each in trainer.optimizers if warmed_up
    ]
    for step in range(1, 9):
        try:
            if closure:
                trainer.steps += 1

                def again() -> Tensor:
                    trainer.backward()
                    return torch.zeros(())

                for optimizer in trainer.optimizers:
                    optimizer.step(again)  # type: ignore[arg-type]
                    optimizer.zero_grad()
            else:
                trainer.step()
        except commhooks.RegistrationError as error:
            dist.barrier()
            return step, str(error)
        for rate in rates:
            rate.step()
    trainer.state.finish()
    return 0, ""


@pytest.mark.parametrize("form", ["register", "hook"])
@pytest.mark.parametrize("kind", SHARING)
def test_shared_updates_are_refused_in_the_first_step(kind: str, form: Form) -> None:
    case = Case("OverlapLocalSGD", {"tau": 4}, optimizers=SHARING[kind])
    for step, error in run_ranks(steps_until_refused, 3, case, form, False, False):
        assert step == 1
        assert "shares its updates between the ranks" in error
        assert "island=" in error


@pytest.mark.parametrize(
    ("warmup_steps", "warmed_up", "closure", "refused_at"),
    [(3, False, False, 4), (0, True, False, 2), (0, False, True, 1), (2, False, True, 3)],
)
def test_shared_updates_are_refused_in_the_first_local_step_that_moves(
    warmup_steps: int, warmed_up: bool, closure: bool, refused_at: int
) -> None:
    """While gradients are averaged this is a good optimizer."""
    case = Case("LocalSGD", {"tau": 4}, warmup_steps=warmup_steps, optimizers=in_one(MuonWithAdam))
    for step, error in run_ranks(steps_until_refused, 2, case, "register", warmed_up, closure):
        assert step == refused_at
        assert "MuonWithAdam shares" in error


# What is innocent.


class GlobalNorm(AdamW):
    """Clips by a norm over all ranks: one number travels."""

    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([g.square().sum() for g in gradients]).sum()
        dist.all_reduce(norm)
        for g in gradients:
            g.div_(norm.sqrt())
        return super().step(closure)


class Counted(SGD):
    """Says something through a gather of objects."""

    def step(self, closure: Any = None) -> Any:
        dist.all_gather_object([None] * dist.get_world_size(), dist.get_rank())
        return super().step(closure)


def torchs_muon(model: nn.Module) -> list[Optimizer]:
    return [Muon(matrices(model), lr=0.02), AdamW(vectors(model), lr=0.01)]


INNOCENT = {
    "norm": in_one(GlobalNorm),
    "words": in_one(Counted),
    "torch": torchs_muon,
}


@pytest.mark.parametrize("kind", INNOCENT)
@pytest.mark.parametrize("warmed_up", [False, True])
def test_what_sends_numbers_alone_is_not_refused(kind: str, warmed_up: bool) -> None:
    case = Case("LocalSGD", {"tau": 4}, optimizers=INNOCENT[kind])
    for step, error in run_ranks(steps_until_refused, 2, case, "register", warmed_up, False):
        assert (step, error) == (0, "")


class Mixture(nn.Module):
    """Half of it sees no data in the first steps, and weight decay alone moves it."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.other = ragged_model(), ragged_model()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x) + 0 * self.other(x)
        return y


def mixture(dtype: torch.dtype) -> nn.Module:
    return initialise(Mixture()).to(dtype)


class DecayedNorm(GlobalNorm):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, weight_decay=0.1)


def test_gradients_of_zero_are_no_shared_updates() -> None:
    case = Case("LocalSGD", {"tau": 4}, optimizers=in_one(DecayedNorm), model=mixture)
    for step, error in run_ranks(steps_until_refused, 2, case, "register", False, False):
        assert (step, error) == (0, "")


def inside_an_island() -> tuple[int, list[str]]:
    group, _ = dist.new_subgroups(2)  # type: ignore[no-untyped-call]
    assert group is not None
    case = Case(
        "LocalSGD",
        {"tau": 2},
        island=2,
        optimizers=lambda model: [
            ClusterMuon(matrices(model), group=group),
            AdamW(vectors(model), lr=0.01),
        ],
    )
    with heard() as lines:
        trainer = Trainer(case, island=2)
        for _ in range(8):
            trainer.step()
        trainer.state.finish()
    return trainer.state.stats.foreign_collectives, [line for line in lines if "wait" in line]


def test_ranks_of_an_island_may_share_updates() -> None:
    """As the error advises."""
    assert run_ranks(inside_an_island, 4) == [(0, [])] * 4


def by_one_rank_alone() -> int:
    """A collective of another thread falls into the step of an optimizer, on one rank alone."""
    shared_updates._SECONDS = 1.0
    trainer = Trainer(Case("LocalSGD", {"tau": 4}))
    trainer.backward()
    (optimizer,) = trainer.optimizers
    works: list[Any] = []

    def send(*_: Any) -> None:
        works.append(dist.all_reduce(torch.ones(1), async_op=True))

    if trainer.rank == 0:
        handle = optimizer.register_step_pre_hook(send)
        optimizer.step()
        handle.remove()
    else:
        optimizer.step()
        send()
    works[0].wait()
    for _ in range(4):
        trainer.step()
    trainer.state.finish()
    return trainer.state.stats.step


def test_one_rank_alone_asks_in_vain() -> None:
    assert run_ranks(by_one_rank_alone, 2) == [5, 5]
