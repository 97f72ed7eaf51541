"""How far the workers are apart now, parameter by parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from commhooks.drift import DriftTable, ParameterDrift
from commhooks.engine.network.links import Links
from commhooks.engine.vectors.buckets import Bucket
from commhooks.engine.vectors.devices import catch_up_with_callbacks

__all__ = ["drift_table"]


def drift_table(
    buckets: Sequence[Bucket], reference: str, names: Mapping[int, str], links: Links
) -> DriftTable:
    """Compare all workers' parameters with what they have in common. Collective; blocks.

    Args:
        buckets: the parameters, nothing of them in flight.
        reference: name of the vector that is in common.
        names: of all parameters, by the ``id`` of this rank's.
        links: the ranks.

    Raises:
        RuntimeError: the communication failed.
    """
    m = links.peers.size
    numbers = {name: number for number, name in enumerate(names.values())}
    # Of this rank's share: ||x - z||^2, ||z||^2, ||mean (x - z)||^2.
    squares = torch.zeros(3, len(numbers), dtype=torch.float64, device=buckets[0].device)
    with torch.no_grad():
        for bucket in buckets:
            z = bucket.vectors[reference]
            moved = torch.empty_like(z)
            bucket.gather_share(moved)
            mine = [numbers[names[id(tensor)]] for tensor in bucket.owned]
            moved.sub_(z)
            alone = _squares(bucket, moved)
            if bucket.length:
                links.peers.all_reduce(moved.div_(m)).wait()
                catch_up_with_callbacks(bucket.device)
            for row, found in enumerate((alone, _squares(bucket, z), _squares(bucket, moved))):
                for number, square in zip(mine, found, strict=True):
                    squares[row, number] += square.to(squares.device)
        if links.island is not None:
            links.island.all_reduce(squares).wait()
        # Of a whole worker now.
        over_workers = torch.stack([squares[0], squares[0].sqrt()]) / m
        links.peers.all_reduce(over_workers).wait()
        catch_up_with_callbacks(squares.device)
    rows = []
    columns = zip(names.values(), *over_workers.tolist(), *squares[1:].tolist(), strict=True)
    for name, apart, mean, length, together in columns:
        distance, norm = math.sqrt(apart), math.sqrt(length)
        rows.append(
            ParameterDrift(
                name,
                relative_drift=distance / norm if norm else math.inf if distance else 0.0,
                agreement=min(1.0, math.sqrt(together) / mean) if mean else 0.0,
                distance=distance,
                norm=norm,
            )
        )
    return DriftTable(sorted(rows, key=lambda row: -row.relative_drift))


def _squares(bucket: Bucket, flat: Tensor) -> list[Tensor]:
    """The squared norm of every parameter's part."""
    return [
        torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in bucket.parts(flat)
    ]
