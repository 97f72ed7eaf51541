"""FSDP2's own options, each under a blocking and a delayed algorithm, against the reference."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import SGD

from tests.cases import Case
from tests.diloco.family import deep_model
from tests.expected import assert_follows, assert_ranks_follow, reference_workers
from tests.harness import run_ranks
from tests.reference import AllReduce, flat
from tests.sharded.training import (
    TIDY,
    ShardedTrainer,
    Sharding,
    islands_of,
    shard,
    sharded_trajectory,
)
from tests.workload import initialise, loss, plain_sgd


def in_two_halves(model: nn.Module, rank: int, step: int) -> None:
    """Gradient accumulation: FSDP2 keeps the whole gradient of the first half to itself."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
    torch.autograd.backward(loss(model, rank, 2 * step) / 2)
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(True)
    torch.autograd.backward(loss(model, rank, 2 * step + 1) / 2)


class TiedModel(nn.Module):
    """The second layer's weight is the first one's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return y


def tied_model(dtype: torch.dtype) -> nn.Module:
    return initialise(TiedModel()).to(dtype)


def as_one(module: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    """One group of parameters for the whole model, as tied ones need."""
    fully_shard(module, mesh=mesh["shard"], **options)
    return module


def checkpointed(module: nn.Module) -> nn.Module:
    apply_activation_checkpointing(module, check_fn=lambda each: isinstance(each, nn.Linear))
    return module


def cases(**settings: Any) -> list[Case]:
    settings = {"dtype": torch.float64, "model": deep_model, "island": 2, "steps": 9, **settings}
    outer = partial(SGD, lr=0.7, momentum=0.9)
    return [
        Case("LocalSGD", {"tau": 2}, 1, **settings),
        Case("DiLoCo", {"tau": 3, "fragments": 2, "delay": 2, "outer": outer}, **settings),
    ]


PAIRS: Sequence[tuple[Case, Sharding]] = [
    (case, sharding)
    for sharding, settings in (
        (Sharding({"reshard_after_forward": False}), {}),
        (Sharding({"reshard_after_forward": True}), {}),
        (Sharding(change=checkpointed), {}),
        (Sharding(apply=as_one), {"model": tied_model}),
        (Sharding(), {"backward": in_two_halves}),
    )
    for case in cases(**settings)
]


def all_of_them() -> list[list[Tensor]]:
    return [sharded_trajectory(case, sharding) for case, sharding in PAIRS]


def test_options_that_change_nothing_of_the_numbers() -> None:
    """Resharding, activation checkpointing, tied weights, accumulation."""
    assert_ranks_follow([case for case, _ in PAIRS], run_ranks(all_of_them, 4, tidy=TIDY))


def mixed_precision() -> tuple[list[Tensor], list[Tensor]]:
    """With the library, and with the means written out."""
    case = replace(cases()[0], warmup_steps=0, dtype=torch.float32, optimizers=plain_sgd)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharding = Sharding({"mp_policy": policy})
    ours = sharded_trajectory(case, sharding)
    mesh = islands_of(case.island)
    model = shard(case.model(case.dtype), mesh, mp_policy=policy)
    (optimizer,) = case.optimizers(model)
    theirs = []
    for step in range(1, case.steps + 1):
        case.backward(model, dist.get_rank(), step)
        optimizer.step()
        optimizer.zero_grad()
        if step % case.tau == 0:
            for p in model.parameters():
                mean = p.to_local() / 2  # type: ignore[attr-defined]
                dist.all_reduce(mean, group=mesh["island"].get_group())
                with torch.no_grad():
                    p.to_local().copy_(mean)  # type: ignore[attr-defined]
        theirs.append(flat([p.full_tensor() for p in model.parameters()]))  # type: ignore[attr-defined]
    return ours, theirs


def test_mixed_precision() -> None:
    """The forward computes in bfloat16; what is averaged are the fp32 shards."""
    for ours, theirs in run_ranks(mixed_precision, 4, tidy=TIDY):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def evaluated(case: Case) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Evaluations inside averaged(), after which the root is left unsharded by its last forward."""
    trainer = ShardedTrainer(case, Sharding({"reshard_after_forward": False}))
    x, outputs = torch.ones(2, 5, dtype=case.dtype), []
    steps, consensus = [], []
    for _ in range(case.steps):
        steps.append(trainer.step())
        with trainer.state.averaged(), torch.no_grad():
            consensus.append(trainer.x)
            outputs.append(trainer.model(x).clone())
    return steps, consensus, outputs


def scaled(case: Case) -> tuple[list[Tensor], int]:
    """With a GradScaler; at one step the loss of a rank of the second island overflows."""
    trainer = ShardedTrainer(case, register=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    trainer.state.register(trainer.model, *trainer.optimizers, scaler=scaler)
    (optimizer,) = trainer.optimizers
    steps = []
    for step in range(1, case.steps + 1):
        value = loss(trainer.model, trainer.rank, step)
        if (step, trainer.rank) == (3, 2):
            value = value * float("inf")
        torch.autograd.backward(scaler.scale(value))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        steps.append(trainer.x)
    return steps, trainer.state.stats.step


def test_an_island_skips_a_step_together() -> None:
    for case in cases(optimizers=plain_sgd):
        case = replace(case, warmup_steps=0, dtype=torch.float32)
        ranks = run_ranks(scaled, 4, case, tidy=TIDY)
        workers = reference_workers(case, 4)
        expected = [workers.step(case.worker_backward, {(1, 3)}) for _ in range(case.steps)]
        doubled = [[x for x in each for _ in range(2)] for each in expected]
        assert_follows(case, [steps for steps, _ in ranks], doubled)
        assert all(counted == case.steps for _, counted in ranks)


def disabled(case: Case) -> list[Tensor]:
    trainer = ShardedTrainer(case)
    steps = [trainer.step() for _ in range(5)]
    trainer.state.disable()
    assert trainer.state.stats.step == 5
    return [*steps, *(trainer.step() for _ in range(5, case.steps))]


def test_disable_averages_gradients() -> None:
    for case in cases(optimizers=plain_sgd):
        ranks = run_ranks(disabled, 4, case, tidy=TIDY)
        workers = reference_workers(case, 4)
        expected = [workers.step(case.worker_backward) for _ in range(5)]
        workers.finish()
        workers.algorithm = AllReduce()
        expected += [workers.step(case.worker_backward) for _ in range(5, case.steps)]
        assert_follows(case, ranks, [[x for x in each for _ in range(2)] for each in expected])


def test_evaluation_of_the_consensus() -> None:
    for case in cases():
        ranks = run_ranks(evaluated, 4, case, tidy=TIDY)
        assert_ranks_follow([case], [[steps] for steps, _, _ in ranks])
        for step in range(case.steps):
            here = [steps[step] for steps, _, _ in ranks]
            mean = (here[0] + here[2]) / 2
            plain = case.model(case.dtype)
            torch.nn.utils.vector_to_parameters(mean, plain.parameters())
            expected = plain(torch.ones(2, 5, dtype=case.dtype))
            for _, consensus, outputs in ranks:
                torch.testing.assert_close(consensus[step], mean, rtol=0, atol=1e-13)
                torch.testing.assert_close(outputs[step], expected, rtol=0, atol=1e-12)
