"""Frozen parameters, and tensors that a model keeps outside of parameters and buffers.

No gradient moves a frozen parameter, but the loop may: an EMA teacher, a target network. Each rank
then has its own, made of its own trained parameters, and beside their mean belongs its mean. A
frozen base, however, is the same everywhere and large, and is not sent. So the ranks compare
fingerprints whenever they meet, and exchange only what differs.

Tensors that hang on frozen parameters or on modules as plain attributes, such as the scales of
4-bit weights, are sent by nobody, neither DDP nor this package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

from torch import Tensor, nn

from commhooks.engine.vectors.bits import ordered_fingerprint
from commhooks.engine.vectors.buffers import Buffer, can_be_sent, write
from commhooks.engine.vectors.spectral import SpectralPair

__all__ = ["Attribute", "Frozen", "Held", "Unlike", "find_attributes", "find_frozen", "named"]

# How deep lists, dictionaries and objects are looked through.
_DEPTH = 4

# Names in a message; a base has thousands.
_SHOWN = 4


@dataclass(frozen=True)
class Frozen:
    """One frozen parameter.

    Attributes:
        name: as in ``module.named_parameters()``.
        tensor: the parameter, or this rank's shard of it.
        sharded: whether it is a shard, which only the peers in other islands have, too.
        fingerprint: stands for its bits.
    """

    name: str
    tensor: Tensor
    sharded: bool
    fingerprint: int

    compared = False

    @property
    def averaged(self) -> bool:
        """Whether it has a mean; what has not becomes the first rank's."""
        return _has_mean(self.tensor)

    def describe(self) -> tuple[object, ...]:
        """What ranks must have in common of it: what it is, and last its fingerprint."""
        kind = (tuple(self.tensor.shape), str(self.tensor.dtype), self.sharded)
        return *kind, self.fingerprint

    def put_back(self, own: Tensor) -> None:
        """Give it this rank's own numbers again."""
        write(self.tensor, own)


@dataclass(frozen=True)
class Attribute:
    """One tensor that is neither a parameter nor a buffer.

    Attributes:
        name: where it was found.
        decodes: whether it hangs on a frozen parameter, or on a module with one of integers, whose
            numbers mean nothing without it.
        fingerprint: stands for its bits.
    """

    name: str
    decodes: bool
    fingerprint: int

    def describe(self) -> tuple[object, ...]:
        """What ranks must have in common of it."""
        return self.decodes, self.fingerprint


class Held(NamedTuple):
    """What a model holds besides the parameters that are averaged."""

    buffers: Sequence[Buffer] = ()
    frozen: Sequence[Frozen] = ()
    spectral: Sequence[SpectralPair] = ()


class Unlike(NamedTuple):
    """Frozen parameters that are not the same on all ranks, by name.

    Attributes:
        bits: of those that hold other numbers.
        kinds: of those that some ranks do not have, or in another shape or format.
    """

    bits: list[str]
    kinds: list[str]

    @classmethod
    def of(
        cls,
        everyone: Sequence[Mapping[str, tuple[object, ...]]],
        peers: Sequence[Sequence[int]],
    ) -> Unlike:
        """What the ranks' descriptions say, the same on every rank.

        Args:
            everyone: every rank's frozen parameters, see :meth:`Frozen.describe`.
            peers: the places in ``everyone`` of those that hold the same shard, for every shard.
        """
        found = cls([], [])
        for name in sorted(set().union(*everyone)):
            each = [mine.get(name, ()) for mine in everyone]
            sharded = any(one[2:3] == (True,) for one in each)
            teams = [[each[n] for n in team] for team in peers] if sharded else [each]
            if any(len({one[:-1] for one in team}) > 1 for team in teams):
                found.kinds.append(name)
            elif any(len(set(team)) > 1 for team in teams):
                found.bits.append(name)
        return found


def find_frozen(
    model: nn.Module, trained: Container[str], ignored: Container[str] = ()
) -> list[Frozen]:
    """The frozen parameters that can be sent, by name.

    Args:
        model: the model.
        trained: names of the parameters that are averaged.
        ignored: names of those that stay a rank's own.
    """
    parameters = [(name, _local(p)) for name, p in model.named_parameters() if name not in ignored]
    # A frozen one may be another name for the memory of a trained one.
    taken = {mine.data_ptr() for name, mine in parameters if name in trained}
    frozen = [
        Frozen(name, mine, mine is not model.get_parameter(name), ordered_fingerprint(mine))
        for name, mine in parameters
        if name not in trained and _is_plain(mine) and mine.data_ptr() not in taken
    ]
    return sorted(frozen, key=lambda each: each.name)


def find_attributes(model: nn.Module, trained: Container[str]) -> list[Attribute]:
    """The tensors that hang on modules and on frozen parameters, by name.

    Args:
        model: the model.
        trained: names of the parameters that are averaged.
    """
    held = (*map(_local, model.parameters()), *model.buffers())
    known = {each.untyped_storage().data_ptr() for each in held if _is_plain(each)}
    found = [
        Attribute(name, decodes, ordered_fingerprint(tensor))
        for name, tensor, decodes in _hanging(model, trained)
        # What autograd has made of parameters is made anew by the next forward.
        if not tensor.requires_grad
        and _is_plain(tensor)
        and tensor.untyped_storage().data_ptr() not in known
    ]
    return sorted(found, key=lambda each: each.name)


def named(names: Sequence[str]) -> str:
    """Some names for a message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _has_mean(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_plain(tensor: Tensor) -> bool:
    # A wrapper's numbers are in other tensors.
    return not hasattr(tensor, "__tensor_flatten__") and can_be_sent(tensor) and tensor.numel() > 0


def _hanging(model: nn.Module, trained: Container[str]) -> Iterator[tuple[str, Tensor, bool]]:
    """Every tensor that hangs somewhere, its name, and whether it decodes a frozen parameter."""
    usual = vars(nn.Module())
    for prefix, module in model.named_modules():
        inside = f"{prefix}." if prefix else ""
        # Codes, which mean nothing without what is beside them.
        codes = any(not _has_mean(p) for p in module._parameters.values() if p is not None)
        for key, value in vars(module).items():
            if key not in usual:
                for name, tensor in _tensors(f"{inside}{key}", value, _DEPTH, objects=False):
                    yield name, tensor, codes
    for name, parameter in model.named_parameters():
        # What a shard has is about its mesh.
        if name not in trained and _local(parameter) is parameter:
            for found, tensor in _tensors(name, vars(parameter), _DEPTH, objects=True):
                yield found, tensor, True


def _tensors(
    name: str, value: object, depth: int, *, objects: bool
) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a value; ``objects`` says whether any object is looked into.

    An object may hold anything, such as a trainer or a data set. Those on a parameter belong to it.
    """
    members: Iterable[tuple[object, object]] = ()
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        members = list(value.items())
    elif isinstance(value, list | tuple):
        members = list(enumerate(value))
    elif isinstance(value, nn.Module | type | ModuleType):
        return
    elif dataclasses.is_dataclass(value) or (objects and hasattr(value, "__dict__")):
        members = list(getattr(value, "__dict__", {}).items())
    if depth:
        for key, member in members:
            yield from _tensors(f"{name}.{key}", member, depth - 1, objects=objects)
