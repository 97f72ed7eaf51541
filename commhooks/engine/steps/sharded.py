"""The front end for FSDP2: a model whose parameters are shards, and where its steps are counted."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from commhooks.engine.network.agreement import compare, described, tell
from commhooks.engine.network.communicator import named_group
from commhooks.engine.network.islands import Layout, lay_out
from commhooks.engine.steps.model import unwrapped_model
from commhooks.engine.steps.optimizers import OptimizerWatch, Watched, owned
from commhooks.errors import RegistrationError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

__all__ = ["ShardCheck", "ShardedWatch", "as_sharded", "check_sharded", "local_shard", "meet"]


def as_sharded(model: object) -> FSDPModule | None:
    """The model, if ``fully_shard`` was applied to it; it may be a compiled one, or Fabric's."""
    # Not imported for those who do not use it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    inner = unwrapped_model(model)
    return inner if fsdp is not None and isinstance(inner, fsdp.FSDPModule) else None


def local_shard(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, which shares its memory."""
    with torch.no_grad():
        local: Tensor = parameter.to_local()  # type: ignore[attr-defined]
        return local


def check_sharded(
    parameters: Mapping[str, Tensor], group: dist.ProcessGroup | None, *, elementwise: bool
) -> dist.ProcessGroup:
    """The group of the ranks that hold the model together.

    Args:
        parameters: those that require a gradient, by name.
        group: the ranks that hold the same shard in the other islands.
        elementwise: whether the algorithm may be given a part of a parameter.

    Raises:
        RegistrationError: the model or the group does not fit.
    """
    from torch.distributed.tensor import DTensor

    if group is None:
        raise RegistrationError(
            "A model of fully_shard needs to be told its peers: build the state with process_group="
            "the group of the ranks that hold the same shard in the other islands. With "
            "mesh = init_device_mesh(device, (islands, size), mesh_dim_names=('island', 'shard')), "
            "call fully_shard(model, mesh=mesh['shard']) and take mesh['island'].get_group()."
        )
    if not parameters:
        raise RegistrationError("The model has no parameter that requires a gradient.")
    meshes = set()
    for name, parameter in parameters.items():
        if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim != 1:
            raise RegistrationError(
                f"Parameter {name!r} is not sharded over a mesh of one dimension; apply "
                "fully_shard to the whole model, with a mesh of the ranks of one island and "
                "without ignored_params."
            )
        if parameter.is_meta:
            raise RegistrationError(
                f"Parameter {name!r} has no numbers yet; materialise the model before registering."
            )
        meshes.add(parameter.device_mesh)
    if len(meshes) > 1:
        raise RegistrationError("The model's parameters are sharded over several meshes; use one.")
    mesh: dist.ProcessGroup = meshes.pop().get_group()
    if not elementwise and dist.get_world_size(mesh) > 1:
        raise RegistrationError(
            "The outer optimizer may need whole parameters, and a rank has shards of them; take "
            "one that treats every number by itself, such as SGD, Adam or AdamW of torch.optim."
        )
    return mesh


class _Told(NamedTuple):
    """What a rank tells all others; tuples are sorted by the rank alone, since no two are alike."""

    rank: int
    island: tuple[int, ...]
    peers: tuple[int, ...]
    refusal: str | None
    facts: dict[str, str]
    name: str


def meet(
    mesh: dist.ProcessGroup | None,
    peers: dist.ProcessGroup | None,
    facts: Mapping[str, object],
    refusal: str | None,
) -> tuple[dist.ProcessGroup, Layout]:
    """Compare ``facts`` between all ranks of all islands, and find a group of them. Collective.

    Args:
        mesh: the ranks of this rank's island; None if it could not be found.
        peers: the ranks that hold the same shard.
        facts: what they must have in common, by name.
        refusal: why this rank cannot register, if it cannot.

    Raises:
        RegistrationError: on every rank, if one refuses or two differ.
    """
    if mesh is None or peers is None:
        # The others have the same script, and so the same refusal.
        raise RegistrationError(refusal)
    mine = _Told(
        dist.get_rank(),
        tuple(dist.get_process_group_ranks(mesh)),
        tuple(dist.get_process_group_ranks(peers)),
        refusal,
        described(facts),
        f"commhooks-{uuid.uuid4().hex}",
    )
    everyone = sorted(each for island in tell(peers, tell(mesh, mine)) for each in island)
    ranks = [each.rank for each in everyone]
    compare(ranks, [each.facts for each in everyone], [each.refusal for each in everyone], refusal)
    layout = lay_out({each.rank: each.island for each in everyone})
    for each in everyone:
        expected = replace(layout, rank=each.rank).peers
        if sorted(each.peers) != sorted(expected):
            raise RegistrationError(
                f"process_group of rank {each.rank} has the ranks {list(each.peers)}, but the same "
                f"shard is held by {list(expected)}."
            )
    world = dist.group.WORLD
    assert world is not None
    if sorted(dist.get_process_group_ranks(world)) == ranks:
        return world, layout
    return named_group(ranks, like=peers, name=everyone[0].name), layout


class ShardCheck:
    """Finds parameters that are no longer what was registered.

    Args:
        model: the model.
        parameters: those that are averaged, by name.
    """

    def __init__(self, model: FSDPModule, parameters: Mapping[str, Tensor]) -> None:
        self._model = model
        self._shards = {name: (p, local_shard(p).data_ptr()) for name, p in parameters.items()}

    def __call__(self) -> str | None:
        """What is wrong, if anything is."""
        assert isinstance(self._model, nn.Module)
        now = dict(self._model.named_parameters())
        for name, (parameter, address) in self._shards.items():
            if now.get(name) is not parameter or local_shard(parameter).data_ptr() != address:
                return (
                    f"parameter {name!r} has been replaced or moved since the model was registered "
                    "(load_state_dict(assign=True) does that). Load in place, or register a new "
                    "state after it."
                )
        for name, p in now.items():
            if p.requires_grad and name not in self._shards:
                return f"parameter {name!r} requires a gradient now, and did not at registration."
        return None

    def reshard(self) -> None:
        """Let the next forward gather the shards anew, whatever the last one has kept of them."""
        assert isinstance(self._model, nn.Module)
        for module in self._model.modules():
            if (sharded := as_sharded(module)) is not None:
                sharded.reshard()


class Updated(Watched, Protocol):
    """What counts updates as steps."""

    def before_update(
        self, gradients: Sequence[tuple[Tensor, Tensor | None]], *, closure: bool
    ) -> None:
        """An optimizer is about to update the model."""

    def after_update(self) -> None:
        """All optimizers have, or were skipped."""


class ShardedWatch(OptimizerWatch):
    """Counts a step where all optimizers have stepped, since no hook tells of FSDP's backwards.

    Args:
        watched: whose steps they are.
        parameters: those that are averaged.
        optimizers: all that update them.
        scaler: the loop's GradScaler.
    """

    # A comparison of sharded tensors is a collective.
    _looks_for_copies = False
    _watched: Updated

    def __init__(
        self,
        watched: Updated,
        parameters: Sequence[Tensor],
        optimizers: Sequence[Optimizer],
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        super().__init__(watched, parameters, optimizers, scaler=scaler)
        self._shards = [(parameter, local_shard(parameter)) for parameter in parameters]

    def rates(self) -> dict[int, float]:
        """The learning rates in force, by the ``id`` of the shards."""
        rates = super().rates()
        return {id(mine): rates[id(p)] for p, mine in self._shards if id(p) in rates}

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer is about to step."""
        if self._is_mine(optimizer):
            closure = any(callable(each) for each in (*args, *kwargs.values()))
            gradients = [
                (shard, None if p.grad is None else local_shard(p.grad))
                for p, shard in self._shards
            ]
            self._watched.before_update(gradients, closure=closure)
        super().before_step(optimizer, args, kwargs)

    def updated(self, optimizer: Optimizer) -> None:
        """An optimizer has updated its parameters, which is what counts."""
        self._watched.writes.settle(owned(optimizer, self._parameters))

    def after_step(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped, or its step was skipped; told once by whoever knows both."""
        if not self.stepping_for_scaler:
            super().after_step(optimizer)

    def _is_awaited(self) -> bool:
        return True

    def settled(self) -> None:
        """All optimizers have stepped."""
        self._stepped.clear()
        self._watched.after_update()
        if self._watched.boundary_due:
            self._run()
