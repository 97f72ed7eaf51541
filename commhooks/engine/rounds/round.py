"""One parameter all-reduce with what is chained to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from commhooks.engine.guards.process_exit import landing
from commhooks.engine.network.communicator import Communicator
from commhooks.engine.network.ticket import Ticket
from commhooks.engine.rules import Rules
from commhooks.engine.vectors.buckets import Bucket
from commhooks.engine.vectors.devices import Moment, catch_up_with_callbacks, keep_for_this_stream

__all__ = ["Round"]


class Round:
    """The all-reduces of every bucket's ``wire``, and the rules' ``chain`` after each.

    Attributes:
        launched, arrived: when the first all-reduce was started and the last chain had run.

    Args:
        number: the round's number, from 1.
        buckets: the model, with the vectors filled by ``contribute``.
        communicator: where the all-reduces go.
        rules: what is chained to them.
        probes: scalars that are NaN or inf if this rank's parameters are.
    """

    def __init__(
        self,
        number: int,
        buckets: Sequence[Bucket],
        communicator: Communicator,
        rules: Rules,
        probes: list[Tensor],
    ) -> None:
        self.number = number
        self._size = communicator.size
        self._rules = rules
        self._failures: list[str] = []
        self._futures: list[torch.futures.Future[Tensor]] = []
        self._device = device = buckets[0].device
        self.launched = self.arrived = Moment(device)
        self._ticket: Ticket | None = None
        try:
            with record_function("commhooks::launch"):
                self._ticket = Ticket(
                    communicator, device, consensus=False, number=number, probes=probes
                )
                for bucket in buckets:
                    reduced = communicator.all_reduce(bucket.vectors["wire"])
                    self._futures.append(reduced.then(landing(self._chained_to(bucket))))
        except RuntimeError as error:
            # Raised by `wait`, like every other failure, before anything is mixed.
            self._failures.append(str(error))

    @property
    def done(self) -> bool:
        """Whether the result, chained update included, has arrived (or the round has failed)."""
        return all(future.done() for future in self._futures) and self.arrived.passed

    def wait(self) -> str | None:
        """Wait for every bucket; the cause of the failure, if the round has failed."""
        with record_function("commhooks::wait"):
            try:
                refusal = self._ticket.wait() if self._ticket is not None else None
            except Exception as error:  # noqa: BLE001 - a backend may raise anything
                refusal = str(error)
            if refusal is not None:
                # The payloads may never arrive, or may be paired with something else.
                self._failures.insert(0, refusal)
                return refusal
            for future in self._futures:
                try:
                    future.wait()
                except Exception as error:  # noqa: BLE001 - a backend may raise anything
                    self._failures.append(str(error))
            catch_up_with_callbacks(self._device)
        return self._failures[0] if self._failures else None

    def _chained_to(self, bucket: Bucket) -> Callable[[torch.futures.Future[Any]], Tensor]:
        def chain(reduced: torch.futures.Future[Any]) -> Tensor:
            """Runs on the backend's thread when the all-reduce ends."""
            wire = bucket.vectors["wire"]
            try:
                reduced.value()
                with record_function("commhooks::chain"):
                    for vectors in bucket.slices:
                        if self._size > 1:
                            vectors["wire"].mul_(1.0 / self._size)
                        self._rules.chain(**vectors)
            except Exception as error:
                # The future would wrap this in C++ stack frames; `wait` reports the plain text.
                self._failures.append(str(error))
                raise
            self.arrived = Moment(wire.device)
            keep_for_this_stream(bucket.vectors.values())
            # A CUDA future records the tensors it holds on the streams that wait for it.
            return wire

        return chain
