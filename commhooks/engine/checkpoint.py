"""A state's vectors and counters as tensors and plain values, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from commhooks.engine.layout import Bucket
from commhooks.errors import CheckpointError

__all__ = ["check_identity", "dump_vectors", "load_vectors"]

FORMAT = 2
"""Version of the dictionary's layout; a later one that reads differently gets another number.

2 added ``gradient_buckets``, without which a resume is not exact where gradients are averaged.
"""


def dump_vectors(buckets: Sequence[Bucket], names: Iterable[str]) -> dict[str, list[Tensor]]:
    """Copies of the named vectors, one tensor a parameter, whatever the buckets' sizes."""
    return {
        name: [part for bucket in buckets for part in bucket.parts(bucket.vectors[name].clone())]
        for name in names
    }


def load_vectors(buckets: Sequence[Bucket], vectors: Mapping[str, Sequence[Tensor]]) -> None:
    """Fill the buckets' vectors; nothing is written if a shape does not fit.

    Raises:
        CheckpointError: another number of parameters, or another shape.
    """
    wanted = [
        tuple(part.shape) for bucket in buckets for part in bucket.parts(bucket.vectors["wire"])
    ]
    for name, parts in vectors.items():
        shapes = [tuple(part.shape) for part in parts]
        if shapes != wanted:
            position = next(
                (i for i, (a, b) in enumerate(zip(shapes, wanted, strict=False)) if a != b),
                min(len(shapes), len(wanted)),
            )
            raise CheckpointError(
                f"The checkpoint's vector {name!r} has {len(shapes)} parameters, this model "
                f"{len(wanted)}; they first differ at parameter number {position}: "
                f"{shapes[position : position + 1]} against {wanted[position : position + 1]}."
            )
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
