"""The ranks of an island put together what each has computed of its share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.profiler import record_function

from commhooks.engine.network.agreement import by_rank
from commhooks.engine.network.communicator import Communicator
from commhooks.engine.network.roll_call import RollCall
from commhooks.engine.network.ticket import Ticket
from commhooks.engine.rounds.fragment import Fragment
from commhooks.engine.vectors.buckets import Bucket
from commhooks.engine.vectors.devices import catch_up_with_callbacks

__all__ = ["Sharing", "put_together"]


class Sharing:
    """The landing of a fragment that the ranks of an island share out.

    Nothing is written to the parameters before all of it is there.

    Args:
        island: the ranks.
        call: where they are, and where a failure is noted.
    """

    def __init__(self, island: Communicator, call: RollCall) -> None:
        self._island = island
        self._call = call

    def all_can(self, refusal: str | None) -> bool:
        """Whether no rank of the island has a refusal. Collective there.

        Raises:
            RoundError: they are not at the same point, or a rank is gone.
        """
        point, refused = self._call.point("a landing"), refusal is not None
        try:
            verdict = Ticket(self._island, self._call.device, point, refused=refused).wait()
        except RuntimeError as error:
            self._fail(str(error))
        if verdict.problem is not None:
            self._fail(verdict.problem)
        return not verdict.refused

    def land(self, fragment: Fragment, refusal: str | None) -> None:
        """Put together what the ranks have mixed. Collective in the island.

        Raises:
            RoundError: a rank has a refusal, they are not at the same point, or one is gone.
        """
        if not self.all_can(refusal):
            self._fail(by_rank(self._island.tell(refusal), self._island.ranks))
        self.put_together(fragment)

    def put_together(self, fragment: Fragment) -> None:
        """The same, where :meth:`all_can` has been asked."""
        try:
            put_together(self._island, fragment.buckets, fragment.common)
        except RuntimeError as error:
            self._fail(str(error))
        fragment.write_common()

    def _fail(self, cause: str) -> NoReturn:
        self._call.note_failure_in_island(cause)
        raise self._call.failure() from None


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
