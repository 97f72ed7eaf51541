"""Pins that all workers begin the local steps with the same parameters, whatever was before.

Until version 0.1 only compressed and sharded runs looked: an anchor that was not the same
everywhere stayed so for the whole run.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from tests.cases import PERIODIC, Case, one_case
from tests.harness import run_ranks
from tests.heard import heard
from tests.training import Trainer
from tests.unseen.test_steps import fused_backward, loss_of
from tests.unseen.together import gap
from tests.workload import ragged_model

Prepare = Callable[[Trainer], None]


def each_its_own_way(trainer: Trainer) -> None:
    """``model.apply(init)`` with another seed on each rank."""
    generator = torch.Generator().manual_seed(trainer.rank)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))


def on_rank_0_alone(trainer: Trainer) -> None:
    """A checkpoint that only the first rank has loaded."""
    if trainer.rank == 0:
        values = trainer.model.module.state_dict()
        trainer.model.module.load_state_dict({k: v + 1 for k, v in values.items()})


def through_data(trainer: Trainer) -> None:
    """By way of ``.data``, which torch does not count."""
    for p in trainer.model.parameters():
        p.data.add_(trainer.rank)


@torch.no_grad()
def in_another_order(trainer: Trainer) -> None:
    """The same numbers everywhere, and nowhere at the same place."""
    for p in trainer.model.parameters():
        p.copy_(p.roll(trainer.rank, dims=0))


class SetsItself(nn.Module):
    """Its scale comes from the first batch that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.within = ragged_model()
        self.scale = nn.Parameter(torch.zeros(3))
        self.seen = False

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.within(x)
        if not self.seen:
            self.seen = True
            self.scale.data.copy_(out.std(dim=0).detach())
        return out * self.scale


PREPARE = [each_its_own_way, on_rank_0_alone, through_data, in_another_order]


def anchors(trainer: Trainer) -> list[Tensor]:
    """Every vector that all workers should have alike."""
    parts = trainer.state.state_dict()["fragments"]
    names = {"z", "W", "s"} if trainer.state.portable else {"z"}
    return [
        tensor
        for part in parts
        for name, tensors in part["vectors"].items()
        if name in names
        for tensor in tensors
    ]


def begin(prepare: Prepare, compression: str | None) -> None:
    for algorithm in PERIODIC:
        with heard() as lines:
            trainer = Trainer(one_case(algorithm, 2, compression=compression))
            prepare(trainer)
            trainer.step()
            if algorithm != "CoCoDSGD":
                assert all(gap(each) == 0.0 for each in anchors(trainer)), algorithm
            # Gradients were computed before, at the rank's own parameters.
            trainer.step()
            trainer.step()
            trainer.state.finish()
            assert gap(trainer.x) == 0.0
        told = [line for line in lines if "different parameters" in line]
        assert len(told) == (trainer.rank == 0), lines


@pytest.mark.parametrize("prepare", PREPARE)
def test_parameters_that_differ_before_the_first_step(prepare: Prepare) -> None:
    run_ranks(begin, 2, prepare, None)


def test_the_same_with_compressed_rounds() -> None:
    run_ranks(begin, 2, each_its_own_way, "int8")


def self_setting() -> None:
    for algorithm in ("DiLoCo", "BMUF", "SlowMo", "OverlapLocalSGD"):
        trainer = Trainer(Case(algorithm, {"tau": 2}, model=lambda dtype: SetsItself()))
        trainer.step()
        assert all(gap(each) == 0.0 for each in anchors(trainer)), algorithm
        trainer.step()
        trainer.state.finish()
        assert gap(trainer.x) == 0.0


def test_a_layer_that_sets_itself_from_its_first_batch() -> None:
    run_ranks(self_setting, 3)


def in_the_middle_of_a_backward() -> None:
    """What lies before the DDP model still needs its weights when its last gradient is ready."""
    trainer = Trainer(one_case("DiLoCo", 2))
    each_its_own_way(trainer)
    before = nn.Linear(5, 5)
    torch.manual_seed(0)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    out = trainer.model(before(x)).sum()
    within = [p.detach().clone() for p in trainer.model.parameters()]
    expected = nn.Sequential(before, ragged_model())
    with torch.no_grad():
        for p, own in zip(expected[1].parameters(), within, strict=True):
            p.copy_(own)
    (gradient,) = torch.autograd.grad(expected(x).sum(), [before.weight])
    torch.autograd.backward(out)
    assert before.weight.grad is not None
    torch.testing.assert_close(before.weight.grad, gradient)
    assert gap(trainer.x) == 0.0


def test_a_backward_is_over_before_parameters_are_replaced() -> None:
    run_ranks(in_the_middle_of_a_backward, 2)


# What leaves ranks apart in warm-up.


def twice(trainer: Trainer) -> None:
    """Two backwards behind one forward, the second of which DDP does not see."""
    value = loss_of(trainer.model, trainer)
    torch.autograd.backward(value, retain_graph=True)
    torch.autograd.backward(value)
    trainer.optimize()


def backwards_twice() -> None:
    for algorithm in PERIODIC:
        trainer = Trainer(one_case(algorithm, 2, warmup_steps=3))
        for _ in range(3):
            trainer.steps += 1
            twice(trainer)
        assert gap(trainer.x) > 1e-4
        with trainer.state.averaged():
            assert gap(trainer.x) == 0.0, algorithm
        trainer.step()
        if algorithm != "CoCoDSGD":
            assert all(gap(each) == 0.0 for each in anchors(trainer)), algorithm
        trainer.state.finish()
        assert gap(trainer.x) == 0.0, algorithm


def test_two_backwards_behind_one_forward_in_warm_up() -> None:
    run_ranks(backwards_twice, 2)


class InGradientHooks:
    """Updates parameters as their gradients come, and has no step (as LOMO does)."""

    def __init__(self, model: nn.Module) -> None:
        for p in model.parameters():
            p.register_hook(self._update(p))  # type: ignore[no-untyped-call]

    def _update(self, p: Tensor) -> Callable[[Tensor], None]:
        def update(gradient: Tensor) -> None:
            p.data.add_(gradient, alpha=-0.1)

        return update


def without_a_step() -> None:
    for algorithm in ("AllReduce", "LocalSGD", "OverlapLocalSGD", "DiLoCo"):
        with heard() as lines:
            optimizers = lambda model: [SGD(model.parameters(), lr=0.0)]  # noqa: E731
            trainer = Trainer(
                Case(**{**vars(one_case(algorithm, 2, warmup_steps=4)), "optimizers": optimizers})
            )
            InGradientHooks(trainer.model)
            for _ in range(4):
                trainer.step()
            assert gap(trainer.x) > 1e-4
            trainer.state.finish()
            assert gap(trainer.x) == 0.0, algorithm
        assert len([line for line in lines if "were not the same" in line]) == (trainer.rank == 0)


def test_an_optimizer_without_a_step_in_warm_up() -> None:
    run_ranks(without_a_step, 2)


def fused_from_the_first_step() -> None:
    for algorithm in PERIODIC:
        for warmup in (0, 2):
            case = one_case(algorithm, 2, warmup_steps=warmup)
            trainer = Trainer(Case(**{**vars(case), "optimizers": lambda model: []}), "hook")
            fused_backward(trainer.model)
            for _ in range(warmup + 1):
                trainer.step()
            if algorithm != "CoCoDSGD":
                assert all(gap(each) == 0.0 for each in anchors(trainer)), algorithm
            assert gap(trainer.x) == 0.0


def test_anchors_of_optimizers_that_step_inside_the_backward() -> None:
    run_ranks(fused_from_the_first_step, 2)


def in_islands() -> None:
    trainer = Trainer(one_case("DiLoCo", 2, island=2))
    each_its_own_way(trainer)
    trainer.step()
    assert len({float(each.norm()) for each in anchors(trainer)}) >= 1
    trainer.step()
    trainer.state.finish()
    assert gap(trainer.x) == 0.0


def test_islands() -> None:
    run_ranks(in_islands, 4)


def a_common_start() -> None:
    """Nothing is told, and nothing is changed."""
    for algorithm in PERIODIC:
        with heard() as lines:
            trainer = Trainer(one_case(algorithm, 2))
            _ = trainer.state.lr_factor
            with torch.no_grad():
                for p in trainer.model.parameters():
                    p.fill_(0.5)
            trainer.backward()
            assert all(bool((p == 0.5).all()) for p in trainer.model.parameters())
            trainer.optimize()
            trainer.state.finish()
        assert not [line for line in lines if "wants" not in line], lines


def test_parameters_that_are_written_alike() -> None:
    run_ranks(a_common_start, 2)
