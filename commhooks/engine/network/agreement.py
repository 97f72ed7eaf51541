"""Ranks tell one another what they are about to do, and all refuse if one differs."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from commhooks.engine.guards.process_exit import landing
from commhooks.engine.network.waiting import until, watch
from commhooks.engine.network.words import plain
from commhooks.errors import RegistrationError

__all__ = ["agree", "by_rank", "compare", "described", "tell"]

T = TypeVar("T")

# Differences named in an error; a model with another width has hundreds.
_SHOWN = 5


def tell(group: dist.ProcessGroup, mine: T) -> list[T]:
    """Every rank's value, in the order of the group. Collective; blocks.

    As ``dist.all_gather_object``, whose wait for ranks that never come has no end.

    Raises:
        RegistrationError: a rank has left, or the ranks wait for one another.
    """
    if dist.get_world_size(group) == 1:
        return [mine]
    watch()
    device = torch.device(distributed_c10d._get_object_coll_device(group))
    packed, length = distributed_c10d._object_to_tensor(mine, device, group)  # type: ignore[no-untyped-call]
    try:
        lengths = [int(each) for each in _gathered(group, length)]
        rows = _gathered(group, packed.resize_(max(lengths)))
    except RuntimeError as error:
        raise RegistrationError(
            f"The ranks could not tell one another what they do: {plain(str(error))}"
        ) from error
    return [
        distributed_c10d._tensor_to_object(row, each, group)  # type: ignore[no-untyped-call]
        for row, each in zip(rows, lengths, strict=True)
    ]


def _gathered(group: dist.ProcessGroup, mine: Tensor) -> list[Tensor]:
    """Every rank's tensor, all of one shape. Collective; blocks."""
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    work = dist.all_gather(everyone, mine, group=group, async_op=True)
    landed = threading.Event()
    work.get_future().then(landing(lambda _: landed.set()))
    until(landed, group)
    work.wait()
    return everyone


def by_rank(reasons: Sequence[str | None], ranks: Sequence[int] | None = None) -> str:
    """What went wrong, each reason with its rank: 0, 1, ... if ``ranks`` does not say."""
    numbers = range(len(reasons)) if ranks is None else ranks
    return "; ".join(f"rank {n}: {why}" for n, why in zip(numbers, reasons, strict=True) if why)


def agree(
    group: dist.ProcessGroup, facts: Mapping[str, object], refusal: str | None = None
) -> None:
    """Compare ``facts`` between the ranks of ``group``. Collective.

    Args:
        group: the ranks that must agree.
        facts: what this rank is about to do, by name; values are compared by their ``repr``.
        refusal: why this rank cannot register, if it cannot.

    Raises:
        RegistrationError: on every rank, if a rank refuses or two ranks differ.
    """
    everyone = tell(group, (refusal, described(facts)))
    refusals, said = zip(*everyone, strict=True)
    compare(dist.get_process_group_ranks(group), said, refusals, refusal)


def described(facts: Mapping[str, object]) -> dict[str, str]:
    """Facts as ranks tell them to one another."""
    return {name: repr(value) for name, value in facts.items()}


def compare(
    ranks: Sequence[int],
    said: Sequence[Mapping[str, str]],
    refusals: Sequence[str | None],
    mine: str | None,
) -> None:
    """What all ranks conclude from what all of them have told.

    Args:
        ranks: their global numbers.
        said: what each of them is about to do, see :func:`described`.
        refusals: why each of them cannot register, if it cannot.
        mine: this rank's own refusal.

    Raises:
        RegistrationError: a rank refuses, or two differ; the differences are named.
    """
    if mine is not None:
        raise RegistrationError(mine)
    if named := by_rank(refusals, ranks):
        raise RegistrationError(f"Registration was refused: {named}")
    differences = _differences(ranks, said)
    if differences:
        more = len(differences) - _SHOWN
        raise RegistrationError(
            "The ranks disagree, so their rounds would not match; register the same state on "
            "every rank. "
            + "; ".join(differences[:_SHOWN])
            + (f"; and {more} more differences" if more > 0 else "")
        )


def _differences(ranks: Sequence[int], everyone: Sequence[Mapping[str, str]]) -> list[str]:
    """One sentence for every name whose value on some rank is not the first rank's."""
    names = list(dict.fromkeys(name for facts in everyone for name in facts))
    sentences = []
    for name in names:
        values = [facts.get(name, "missing") for facts in everyone]
        for rank, value in zip(ranks, values, strict=True):
            if value != values[0]:
                sentences.append(f"{name}: {values[0]} on rank {ranks[0]}, {value} on rank {rank}")
                break
    return sentences
