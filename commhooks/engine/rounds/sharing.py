"""The ranks of an island put together what each has computed of its share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from commhooks.engine.network.communicator import Communicator
from commhooks.engine.vectors.buckets import Bucket
from commhooks.engine.vectors.devices import catch_up_with_callbacks

__all__ = ["put_together"]


def put_together(island: Communicator, buckets: Sequence[Bucket], flats: Sequence[Tensor]) -> None:
    """Fill every flat vector with the shares of the ranks that have them. Collective; blocks.

    Args:
        island: the ranks; the number of a share is that of its rank.
        buckets: how the vectors are shared out.
        flats: one a bucket, of its length, in which this rank's share holds what it has.

    Raises:
        RuntimeError: the communication failed; the vectors may hold anything then.
    """
    with record_function("commhooks::put_together"):
        futures: list[torch.futures.Future[Any]] = []
        for bucket, flat in zip(buckets, flats, strict=True):
            for owner, (start, stop) in enumerate(pairwise(bucket.edges)):
                if start < stop:
                    futures.append(island.broadcast(flat[start:stop], owner))
        for future in futures:
            future.wait()
        for device in {bucket.device for bucket in buckets}:
            catch_up_with_callbacks(device)
