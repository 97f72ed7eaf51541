"""Where a backward begins and ends, as seen from DDP's gradient buckets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

__all__ = ["Backwards"]

# DDP lays its buckets out anew after a process's first backward, with ``static_graph`` its second.
_FIRST_ONES = 2


class Backwards:
    """Tells the first and the last bucket of every backward.

    ``bucket.index()`` and ``bucket.is_last()`` do, but for the first backward of a model with
    ``static_graph=True``: there every bucket has the index 0, and with parameters of two dtypes
    none is the last. In the first ones the parameters that have been seen are counted instead.

    Args:
        parameters: all that DDP reduces.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        # DDP still reduces those that have been frozen since it wrapped the model.
        self._all = {id(parameter) for parameter in parameters}
        self._seen: set[int] = set()
        self._under_way = False
        self._ended = 0

    def place(self, bucket: GradBucket) -> tuple[bool, bool]:
        """Whether this bucket is the first of its backward, and whether it is the last."""
        if self._ended >= _FIRST_ONES:
            return bucket.index() == 0, bucket.is_last()
        here = {id(parameter) for parameter in bucket.parameters()} & self._all
        if not here.isdisjoint(self._seen):
            # The backward before was cut short by an error.
            self._seen = set()
            self._under_way = False
        first, self._under_way = not self._under_way, True
        self._seen |= here
        last = bucket.is_last() or self._seen == self._all
        if last:
            self._seen, self._under_way = set(), False
            self._ended += 1
        return first, last
