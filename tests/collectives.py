"""Counts the collectives that this process takes part in, whoever starts them.

Backends number their collectives; DDP's own, started in C++, are counted like all others. The
profiler would see them too, but torch 2.13's corrupts memory where it stops with one in flight.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """How many collectives ran in the block, by group (``default_pg``, ``commhooks``, ...)."""
    counter: Counter[str] = Counter()
    before = _so_far()
    yield counter
    counter.update(_so_far() - before)


def _so_far() -> Counter[str]:
    numbers: Counter[str] = Counter()
    for group in dist.distributed_c10d._world.pg_map:
        backend = group._get_backend(torch.device("cpu"))
        numbers[group.group_desc] += backend._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return numbers
