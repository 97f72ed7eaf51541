"""What compressed rounds keep: the mean of models that stand still, and the consensus."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD

import commhooks
from tests.harness import run_ranks
from tests.reference import flat
from tests.training import wrapped
from tests.workload import batch, initialise

KINDS = ("bf16", "int8", "int4")
ROUNDS = {"bf16": 12, "int8": 12, "int4": 25}
BYTES = {"bf16": 0.51, "int8": 0.27, "int4": 0.14}


def large_model() -> nn.Module:
    """About 165,000 numbers."""
    return initialise(
        nn.Sequential(nn.Linear(5, 400), nn.Tanh(), nn.Linear(400, 400), nn.Linear(400, 3))
    )


class Standing:
    """Models that go apart in the first step, and never move by themselves after it.

    ``start`` is where they stand when what is averaged from then on is the mean: before the first
    boundary or, where that one draws them back to where all began, behind it.
    """

    def __init__(self, algorithm: str, compression: str | None, **arguments: Any) -> None:
        module = large_model()
        self.model = wrapped(module, bucket_cap_mb=25.0)
        self.optimizer = SGD(module.parameters(), lr=1.0)
        self.state: commhooks.CommHookState = getattr(commhooks, algorithm)(
            **{"tau": 1, "compression": compression, **arguments}
        )
        self.state.register(self.model, self.optimizer)
        began = self.x.clone()
        generator = torch.Generator().manual_seed(dist.get_rank())
        inputs, targets = batch(dist.get_rank(), 1)
        torch.autograd.backward(nn.functional.mse_loss(self.model(inputs), targets))
        moves = []
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            moves.append(p.grad.flatten())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer.param_groups[0]["lr"] = 0.0
        drawn_back = algorithm == "OverlapLocalSGD"
        self.start = self.x.clone() if drawn_back else began - torch.cat(moves)

    @property
    def x(self) -> Tensor:
        return flat(list(self.model.parameters()))

    def step(self) -> None:
        inputs, targets = batch(dist.get_rank(), 1)
        torch.autograd.backward(nn.functional.mse_loss(self.model(inputs), targets))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            self.step()


Ends = tuple[Tensor, Tensor, Tensor, float]


def stand_still(todo: Sequence[tuple[str, dict[str, Any], str]]) -> list[Ends]:
    ends = []
    for algorithm, arguments, kind in todo:
        standing = Standing(algorithm, kind, **arguments)
        standing.run(ROUNDS[kind])
        stats = standing.state.stats
        sent = stats.bytes_reduced / stats.rounds_launched / (4 * standing.x.numel())
        end = standing.x.clone()
        with standing.state.averaged():
            consensus = standing.x.clone()
        ends.append((standing.start, end, consensus, sent))
    return ends


@pytest.mark.parametrize("size", [2, 3, 4])
def test_models_that_stand_still_reach_their_exact_mean(size: int) -> None:
    """Nothing that was rounded off is lost."""
    todo = [
        (algorithm, arguments, kind)
        for kind in KINDS
        for algorithm, arguments in (
            ("LocalSGD", {}),
            ("CoCoDSGD", {}),
            ("BMUF", {"eta": 0.0}),
            ("SlowMo", {"beta": 0.0}),
            ("OverlapLocalSGD", {"alpha": 0.9}),
        )
    ]
    ranks = run_ranks(stand_still, size, todo)
    for number, (algorithm, _, kind) in enumerate(todo):
        mean = torch.stack([rank[number][0] for rank in ranks]).double().mean(dim=0)
        for rank in ranks:
            _, end, consensus, sent = rank[number]
            for x in (end, consensus):
                off = ((x - mean).norm() / mean.norm()).item()
                assert off <= 1e-6, (algorithm, kind, off)
            assert sent <= BYTES[kind], (algorithm, kind)


def consensus_at_once(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """averaged() and finish() before the rounds have come near the mean."""
    standing = Standing("OverlapLocalSGD", kind, alpha=0.3)
    standing.run(2)
    own = standing.x.clone()
    with standing.state.averaged():
        inside = standing.x.clone()
    assert torch.equal(standing.x, own)
    standing.state.finish()
    return own, inside, standing.x.clone()


@pytest.mark.parametrize("kind", KINDS)
def test_the_consensus_is_averaged_in_full(kind: str) -> None:
    ranks = run_ranks(consensus_at_once, 3, kind)
    mean = torch.stack([own for own, _, _ in ranks]).double().mean(dim=0)
    for _, inside, finished in ranks:
        assert torch.equal(inside, ranks[0][1])
        torch.testing.assert_close(inside.double(), mean, rtol=1e-6, atol=1e-7)
        assert torch.equal(finished, inside)


def threads_that_communicate(kind: str) -> set[tuple[str, str]]:
    """Which threads start which collectives while two fragments are in flight."""
    import threading

    seen: set[tuple[str, str]] = set()
    for name in ("all_reduce", "all_to_all_single", "all_gather_single", "broadcast"):
        plain = getattr(dist, name)

        def noted(*args: Any, name: str = name, plain: Any = plain, **kwargs: Any) -> Any:
            seen.add((name, threading.current_thread().name))
            return plain(*args, **kwargs)

        setattr(dist, name, noted)
    standing = Standing("DiLoCo", kind, tau=4, fragments=2, delay=4, alpha=0.5)
    standing.run(10)
    standing.state.finish()
    return seen


def test_collectives_start_on_the_training_thread() -> None:
    for seen in run_ranks(threads_that_communicate, 2, "int8"):
        assert {"all_to_all_single", "all_gather_single"} < {name for name, _ in seen}
        assert {thread for _, thread in seen} == {"MainThread"}
