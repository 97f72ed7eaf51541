"""A state's vectors and counters as tensors and plain values, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from commhooks.engine.vectors.buckets import Bucket
from commhooks.errors import CheckpointError

__all__ = ["check_identity", "check_shapes", "dump_vectors", "load_vectors", "shapes"]

FORMAT = 4
"""Version of the dictionary's layout; a later one that reads differently gets another number.

3 added the parameters' ``shapes``, since not every state keeps vectors to tell another model by; 4
took out the layout of DDP's gradient buckets.
"""


def shapes(buckets: Sequence[Bucket]) -> list[list[int]]:
    """The shapes of the parameters, in the engine's order."""
    return [list(tensor.shape) for bucket in buckets for tensor in bucket.tensors]


def check_shapes(saved: Sequence[Sequence[int]], mine: Sequence[Sequence[int]]) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        CheckpointError: another number of parameters, or another shape.
    """
    if saved == mine:
        return
    position = next(
        (i for i, (a, b) in enumerate(zip(saved, mine, strict=False)) if a != b),
        min(len(saved), len(mine)),
    )
    raise CheckpointError(
        f"The checkpoint is of another model: {len(saved)} parameters, here {len(mine)}; they "
        f"first differ at parameter number {position}, {saved[position : position + 1]} in the "
        f"checkpoint and {mine[position : position + 1]} here."
    )


def dump_vectors(buckets: Sequence[Bucket], names: Iterable[str]) -> dict[str, list[Tensor]]:
    """Copies of the named vectors, one tensor a parameter, whatever the buckets' sizes."""
    return {
        name: [part for bucket in buckets for part in bucket.parts(bucket.vectors[name].clone())]
        for name in names
    }


def load_vectors(buckets: Sequence[Bucket], vectors: Mapping[str, Sequence[Tensor]]) -> None:
    """Fill the buckets' vectors from those of a model of the same shapes."""
    for name, parts in vectors.items():
        rest = list(parts)
        for bucket in buckets:
            count = len(bucket.tensors)
            for mine, part in zip(bucket.parts(bucket.vectors[name]), rest[:count], strict=True):
                mine.copy_(part)
            rest = rest[count:]


def check_identity(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Compare what a checkpoint says of itself with what a state would write.

    Raises:
        CheckpointError: another format, or they differ; every difference is named.
    """
    if saved.get("format") != FORMAT:
        raise CheckpointError(
            f"The checkpoint is of format {saved.get('format')!r}, this version of commhooks "
            f"reads {FORMAT}; go on with the version that wrote it."
        )
    differences = [
        f"{name} is {saved.get(name)!r} in the checkpoint and {value!r} here"
        for name, value in mine.items()
        if saved.get(name) != value
    ]
    if differences:
        raise CheckpointError(
            "The checkpoint belongs to another run: " + "; ".join(differences) + "."
        )
