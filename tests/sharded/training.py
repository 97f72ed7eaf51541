"""What a rank does in the tests of FSDP2: shard over its island, register, train, gather."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

import commhooks
from tests.cases import Case
from tests.reference import flat
from tests.training import make_state

TIDY = False
"""torch keeps a mesh that a model was sharded over, and so the threads of its groups."""


def islands_of(size: int) -> DeviceMesh:
    """A mesh of islands: all the ranks, ``size`` to an island."""
    shape = (dist.get_world_size() // size, size)
    return init_device_mesh("cpu", shape, mesh_dim_names=("island", "shard"))


def shard(module: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    """``fully_shard`` on every layer that has parameters, and on the whole."""
    for layer in module.children():
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh["shard"], **options)
    fully_shard(module, mesh=mesh["shard"], **options)
    return module


@dataclass(frozen=True)
class Sharding:
    """How the model is sharded; ``change`` is applied to it before."""

    options: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[nn.Module], nn.Module] = lambda module: module
    apply: Callable[..., nn.Module] = shard


class ShardedTrainer:
    """This rank's part of a sharded model, and an ordinary training loop."""

    def __init__(
        self,
        case: Case,
        sharding: Sharding | None = None,
        *,
        register: bool = True,
        **options: Any,
    ) -> None:
        sharding = sharding or Sharding()
        self.case, self.steps = case, 0
        self.rank = dist.get_rank()
        self.mesh = islands_of(case.island)
        self.model = sharding.apply(
            sharding.change(case.model(case.dtype)), self.mesh, **sharding.options
        )
        self.optimizers: Sequence[Optimizer] = case.optimizers(self.model)
        group = self.mesh["island"].get_group()
        self.state: commhooks.CommHookState = make_state(
            case, **{"island": None, "process_group": group, **options}
        )
        if register:
            self.state.register(self.model, *self.optimizers)

    @property
    def x(self) -> Tensor:
        """The island's parameters, put together from its shards."""
        return whole(self.model)

    def step(self) -> Tensor:
        self.steps += 1
        self.case.backward(self.model, self.rank, self.steps)
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return self.x


def whole(model: nn.Module) -> Tensor:
    """All parameters that train, flat. Collective in the island."""
    with torch.no_grad():
        return flat([p.full_tensor() for p in model.parameters() if p.requires_grad])  # type: ignore[attr-defined]


def sharded_trajectory(case: Case, sharding: Sharding | None = None) -> list[Tensor]:
    trainer = ShardedTrainer(case, sharding)
    return [trainer.step() for _ in range(case.steps)]


def sharded_trajectories(
    cases: Sequence[Case], sharding: Sharding | None = None
) -> list[list[Tensor]]:
    return [sharded_trajectory(case, sharding) for case in cases]
