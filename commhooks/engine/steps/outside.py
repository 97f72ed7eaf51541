"""What ranks must have in common though DDP does not send it, compared when a state registers."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence

from torch import nn

from commhooks.engine.network.agreement import by_rank, tell
from commhooks.engine.network.links import Links
from commhooks.engine.vectors.frozen import Unlike, find_attributes, find_frozen, named
from commhooks.errors import RegistrationError

__all__ = ["compare_outside"]

logger = logging.getLogger("commhooks")

Described = Mapping[str, tuple[object, ...]]


def compare_outside(
    model: nn.Module, trained: Container[str], ignored: Container[str], links: Links
) -> None:
    """Compare frozen parameters, and tensors that are neither parameters nor buffers. Collective.

    What differs of them may be meant, and is told. But what hangs on a frozen parameter, such as
    the scales of 4-bit weights, is a part of its value, which no average can mend.

    Args:
        model: the model.
        trained: names of the parameters that are averaged.
        ignored: names of those that stay a rank's own.
        links: the ranks.

    Raises:
        RegistrationError: on every rank, if what hangs on a frozen parameter differs.
    """
    problem: str | None = None
    frozen: Described = {}
    hanging: Described = {}
    try:
        frozen = {each.name: each.describe() for each in find_frozen(model, trained, ignored)}
        hanging = {each.name: each.describe() for each in find_attributes(model, trained)}
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must be told
        problem = f"{type(error).__name__}: {error}"
    everyone = links.everyone
    told = tell(everyone.parent, (problem, frozen, hanging))
    problems, frozen_of, hanging_of = zip(*told, strict=True)
    if any(problems):
        raise RegistrationError(
            f"What the ranks hold could not be compared: {by_rank(problems, everyone.ranks)}."
        )
    decoding, others = _different(hanging_of)
    if decoding:
        raise RegistrationError(
            f"The ranks have different {named(decoding)}, which frozen parameters are decoded with "
            "and which DDP does not send, so that the same weights mean another model on every "
            "rank. Load and quantise the same base on every rank."
        )
    if everyone.rank > 0:
        return
    if others:
        logger.warning(
            "commhooks: the ranks hold different %s. These tensors are neither parameters nor "
            "buffers, so that nobody sends them, and averaged() and finish() leave each rank its "
            "own. If the model computes with them, make them the same on every rank, or buffers.",
            named(others),
        )
    unlike = Unlike.of(frozen_of, links.teams)
    if unlike.bits or unlike.kinds:
        logger.warning(
            "commhooks: the ranks begin with different frozen parameters: %s. A base must be "
            "loaded on every rank, or before DistributedDataParallel, which sends the first "
            "rank's. For what the loop itself writes, such as an EMA teacher, nothing is wrong.",
            named([*unlike.bits, *unlike.kinds]),
        )


def _different(hanging_of: Sequence[Described]) -> tuple[list[str], list[str]]:
    """Names of tensors that some ranks have otherwise: those that decode, and all others."""
    found: tuple[list[str], list[str]] = ([], [])
    for name in sorted(set().union(*hanging_of)):
        each = [mine.get(name) for mine in hanging_of]
        if len(set(each)) > 1:
            decodes = any(one is not None and one[0] for one in each)
            found[0 if decodes else 1].append(name)
    return found
