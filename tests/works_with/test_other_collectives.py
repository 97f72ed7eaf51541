"""Pins that collectives which are not the library's are counted, and told once if there are many.

Whoever sends at every step makes all workers wait for one another, and ``seconds_exposed`` cannot
know of it.
"""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

import commhooks
from tests.cases import Case
from tests.harness import run_ranks
from tests.heard import heard
from tests.training import Trainer, wrapped
from tests.workload import gradient, ragged_model, trained

TAU = 4
STEPS = 45
Extra = Callable[[Trainer], object]


def every(period: int, send: Callable[[], object]) -> Extra:
    return lambda trainer: send() if trainer.steps % period == 0 else None


def reduced() -> None:
    dist.all_reduce(torch.ones(1))


def gathered() -> None:
    dist.all_gather_object([None] * dist.get_world_size(), 1)


def trained_with(
    extra: Extra | None,
    model: dict[str, Any],
    options: dict[str, Any],
    steps: int = STEPS,
) -> tuple[int, list[str]]:
    """What is counted, and what is said of it."""
    case = Case("OverlapLocalSGD", {"tau": TAU}, steps=steps, **model)
    with heard() as lines:
        trainer = Trainer(case, **options)
        for _ in range(steps):
            trainer.step()
            if extra is not None:
                extra(trainer)
        counted = trainer.state.stats.foreign_collectives
        trainer.state.finish()
    return counted, [line for line in lines if "wait for one another outside" in line]


def several(
    extras: list[Extra], model: dict[str, Any], options: dict[str, Any]
) -> list[tuple[int, list[str]]]:
    return [trained_with(extra, model, options) for extra in extras]


def silent() -> list[tuple[int, list[str]]]:
    mine = dist.new_group([dist.get_rank()], use_local_synchronization=True)

    def evaluation(trainer: Trainer) -> None:
        with trainer.state.averaged():
            for _ in range(5):
                gathered()

    def island(trainer: Trainer) -> None:
        dist.all_reduce(torch.ones(1), group=mine)

    return several([nothing, evaluation, island], {}, {})


def nothing(trainer: Trainer) -> None:
    pass


def test_what_is_nobody_elses_is_not_counted() -> None:
    """DDP's buckets, rounds, evaluations, and groups that join no workers."""
    for ends in run_ranks(silent, 2):
        assert ends == [(0, [])] * 3


def now_and_then() -> list[tuple[int, list[str]]]:
    return several([every(20, reduced), every(40, gathered)], {}, {})


def test_a_loss_that_is_gathered_now_and_then_is_counted_and_not_told() -> None:
    for ends in run_ranks(now_and_then, 2):
        assert ends == [(2, []), (2, [])]


def often() -> list[tuple[int, list[str]]]:
    aside = dist.new_group(list(range(dist.get_world_size())))

    def elsewhere() -> None:
        dist.broadcast(torch.ones(1), 0, group=aside)

    def background() -> None:
        dist.all_reduce(torch.ones(1), async_op=True).wait()

    extras = [every(1, reduced), every(1, gathered), every(1, elsewhere), every(10, background)]
    return several(extras, {}, {})


def test_what_is_sent_at_every_step_is_told_once() -> None:
    first, second = run_ranks(often, 2)
    # The first interval of a run is DDP's own; the last collective came behind the last step.
    assert [counted for counted, _ in first] == [STEPS - 2, 2 * (STEPS - 2), STEPS - 2, 4]
    assert [counted for counted, _ in second] == [counted for counted, _ in first]
    assert [len(lines) for _, lines in first] == [1, 1, 1, 1]
    assert all(lines == [] for _, lines in second)
    rates = ("20 of the last 20 local steps", "2 a step", "1 a step", "2 of the last 20")
    for (_, lines), rate in zip(first, rates, strict=True):
        assert rate in lines[0]
        assert "a loss, a metric" in lines[0]


class Synced(nn.SyncBatchNorm):
    """The layer is for GPUs alone, as DDP's constructor knows; this sends what it would."""

    def __init__(self) -> None:
        super().__init__(3, affine=False, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        reduced()
        return x


class Clipped(SGD):
    """Clips by the norm over all ranks."""

    def step(self, closure: Any = None) -> Any:
        norm = sum(
            p.grad.square().sum()
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        )
        assert isinstance(norm, Tensor)
        dist.all_reduce(norm)
        return super().step(closure)


def clipped(model: nn.Module) -> list[Optimizer]:
    return [Clipped(trained(model), lr=0.05)]


def synced() -> tuple[int, list[str]]:
    def replace(trainer: Trainer) -> None:
        if trainer.steps == 1:
            body = trainer.model.module
            assert isinstance(body, nn.Sequential)
            body[1] = Synced()

    def with_room(dtype: torch.dtype) -> nn.Module:
        return nn.Sequential(ragged_model(dtype), nn.Identity())

    return trained_with(replace, {"model": with_room}, {})


def caused() -> list[tuple[int, list[str]]]:
    unused = {"ddp": {"find_unused_parameters": True}}
    clips = {"optimizers": clipped}
    return [trained_with(None, unused, {}), trained_with(None, clips, {}), synced()]


def test_causes_are_named() -> None:
    causes = (
        "find_unused_parameters=True of DistributedDataParallel",
        "Clipped.step(), or its closure, communicates",
        "SyncBatchNorm in the model",
    )
    for (counted, lines), cause in zip(run_ranks(caused, 2)[0], causes, strict=True):
        assert counted >= STEPS - 2
        assert cause in lines[0]
        assert sum(each in lines[0] for each in causes) == 1


def beside_a_plain_ddp_model() -> tuple[int, list[str]]:
    """The discriminator of a GAN that was not given a state."""
    other = wrapped(ragged_model())
    return trained_with(lambda trainer: gradient(other, trainer.rank, trainer.steps), {}, {})


def test_another_ddp_model_without_a_state_is_noticed() -> None:
    counted, lines = run_ranks(beside_a_plain_ddp_model, 2)[0]
    assert counted >= STEPS - 2
    assert len(lines) == 1


def two_states() -> list[tuple[int, list[str]]]:
    with heard() as lines:
        pair = [Trainer(Case("LocalSGD", {"tau": TAU}), warmup_steps=30 * n) for n in range(2)]
        for _ in range(STEPS):
            for trainer in pair:
                trainer.step()
        counted = [trainer.state.stats.foreign_collectives for trainer in pair]
    assert not [line for line in lines if "outside commhooks" in line]
    gc.collect()
    return [(each, []) for each in counted]


def test_states_do_not_take_each_other_for_somebody_else() -> None:
    """One averages gradients in its warm-up, by the library's own group."""
    for first, second in run_ranks(two_states, 2):
        # DDP's word of how the second model's buckets were rebuilt.
        assert first[0] <= 4
        assert second[0] == 0


def in_islands(aside: list[list[int]]) -> tuple[int, list[str]]:
    group, _ = dist.new_subgroups_by_enumeration(aside)  # type: ignore[no-untyped-call]
    assert group is not None
    return trained_with(
        lambda _: dist.all_reduce(torch.ones(1), group=group), {}, {"island": 2}, steps=25
    )


@pytest.mark.parametrize(
    ("aside", "counted"), [([[0, 1], [2, 3]], 0), ([[0, 2], [1, 3]], 23)], ids=["within", "across"]
)
def test_only_what_joins_islands_is_counted(aside: list[list[int]], counted: int) -> None:
    for end, _ in run_ranks(in_islands, 4, aside):
        assert end == counted


def averaging() -> list[int]:
    seen = []
    for case in (Case("AllReduce"), Case("LocalSGD", {"tau": TAU}, warmup_steps=STEPS)):
        trainer = Trainer(case)
        with heard() as lines:
            for _ in range(STEPS):
                trainer.step()
                reduced()
        assert not lines
        seen.append(trainer.state.stats.foreign_collectives)
    return seen


def test_nothing_is_counted_while_gradients_are_averaged() -> None:
    assert run_ranks(averaging, 2) == [[0, 0]] * 2


def joined() -> tuple[int, list[str]]:
    model = DistributedDataParallel(ragged_model())
    state = commhooks.OverlapLocalSGD(tau=TAU)
    optimizer = SGD(trained(model), lr=0.05)
    with heard() as lines:
        state.register(model, optimizer)
        with Join([state, model]):
            for step in range(30 + 25 * dist.get_rank()):
                gradient(model, dist.get_rank(), step)
                optimizer.step()
                optimizer.zero_grad()
    told = [line for line in lines if "outside commhooks" in line]
    return state.stats.foreign_collectives, told


def test_join_is_not_taken_for_somebody_else() -> None:
    assert run_ranks(joined, 2) == [(0, [])] * 2
