"""Where a backward begins and ends, as seen from DDP's gradient buckets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

__all__ = ["Backwards"]


class Backwards:
    """Tells the first and the last bucket of every backward.

    ``bucket.index()`` and ``bucket.is_last()`` do, but for the very first backward of a model with
    ``static_graph=True``: there every bucket has the index 0, and with parameters of two dtypes
    none is the last. The parameters that have been seen are counted instead.

    Args:
        parameters: those that DDP reduces.
        static_graph: whether the model was wrapped with ``static_graph=True``.
    """

    def __init__(self, parameters: Iterable[Tensor], *, static_graph: bool = False) -> None:
        self._awaited = {id(parameter) for parameter in parameters} if static_graph else set()
        self._missing = set(self._awaited)

    def place(self, bucket: GradBucket) -> tuple[bool, bool]:
        """Whether this bucket is the first of its backward, and whether it is the last."""
        if not self._awaited:
            return bucket.index() == 0, bucket.is_last()
        here = {id(parameter) for parameter in bucket.parameters()} & self._awaited
        if not here <= self._missing:
            # The backward before was cut short by an error.
            self._missing = set(self._awaited)
        first = self._missing == self._awaited
        self._missing -= here
        last = bucket.is_last() or not self._missing
        if last:
            self._awaited = set()
        return first, last
