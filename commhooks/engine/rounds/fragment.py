"""A part of the model whose rounds go together: its vectors, its schedule, its round in flight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from commhooks.engine.network.ticket import total
from commhooks.engine.rounds.round import Round
from commhooks.engine.rounds.schedule import Schedule
from commhooks.engine.rules import Kept, Part, Rules
from commhooks.engine.vectors.buckets import Bucket
from commhooks.engine.vectors.devices import HostCopy, finiteness, squared_norm

__all__ = ["Fragment"]


class Fragment:
    """Some parameters in flat buckets, and the rules that are applied to them.

    Attributes:
        buckets: the parameters, with the vectors that go with them.
        schedule: when rounds are launched and land.
        round: what is in flight; None once it has been waited for.
        kept: what the algorithm keeps besides vectors.
        rates: the learning rates at the last launch, one a parameter.
        squared_distance: of the parameters to what they were last drawn to.

    Args:
        buckets: the parameters.
        schedule: when rounds are launched and land.
        workers: the number of workers m.
    """

    def __init__(self, buckets: Sequence[Bucket], schedule: Schedule, workers: int) -> None:
        self.buckets = list(buckets)
        self.schedule = schedule
        self.round: Round | None = None
        self.squared_distance: HostCopy | None = None
        self.kept: Kept | None = None
        self.rates: list[float | None] | None = None
        self._workers = workers

    @property
    def parameters(self) -> list[Tensor]:
        """What lies in the buckets, in order."""
        return [tensor for bucket in self.buckets for tensor in bucket.tensors]

    @property
    def device(self) -> torch.device:
        """Where its first bucket lies."""
        return self.buckets[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of one flat vector as long as the fragment."""
        return sum(bucket.nbytes for bucket in self.buckets)

    def allocate(self, vectors: Sequence[str]) -> None:
        """Make the vectors, unless they are there."""
        for bucket in self.buckets:
            if not bucket.vectors:
                bucket.allocate(("wire", *vectors))

    def start(self, rules: Rules) -> None:
        """Begin at the parameters as they are."""
        self.allocate(rules.vectors)
        self.sweep(rules, "start")
        self.rates = None
        self.kept = rules.keep(self.parts())

    def prepare(self, rules: Rules, rates: Callable[[], Mapping[int, float]]) -> None:
        """Show the algorithm the learning rates in force, if it looks at them."""
        if not rules.looks_at_rates:
            return
        by_id = rates()
        now = [by_id.get(id(tensor)) for tensor in self.parameters]
        rules.prepare(self.parts(now))
        self.rates = now

    def parts(self, rates: Sequence[float | None] = ()) -> list[Part]:
        """The fragment, parameter by parameter."""
        parts: list[Part] = []
        for bucket in self.buckets:
            shaped = {name: bucket.parts(flat) for name, flat in bucket.vectors.items()}
            for number, tensor in enumerate(bucket.tensors):
                vectors = {name: views[number] for name, views in shaped.items()}
                at = len(parts)
                now = rates[at] if rates else None
                parts.append(Part(tensor, vectors, now, self.rates[at] if self.rates else None))
        return parts

    def dump_kept(self) -> dict[str, Any] | None:
        """What is kept, as tensors and plain values that later steps do not change."""
        return None if self.kept is None else copy.deepcopy(self.kept.state_dict())

    def load_kept(self, rules: Rules, saved: Mapping[str, Any] | None) -> None:
        """Go on from what :meth:`dump_kept` gave and the rules have found good."""
        self.kept = rules.keep(self.parts())
        if self.kept is not None:
            self.kept.load_state_dict(saved)

    def release(self) -> None:
        """Let go of the vectors."""
        self.kept = None
        for bucket in self.buckets:
            bucket.release()

    def refresh(self) -> None:
        """Find out where the parameters lie now.

        Raises:
            RegistrationError: a parameter is not what it was.
        """
        for bucket in self.buckets:
            bucket.refresh()

    def sweep(self, rules: Rules, *names: str) -> list[Tensor]:
        """Apply rules to the model, chunk by chunk; ``mix`` alone writes to the parameters.

        Returns:
            Scalars that are NaN or inf if a parameter is.
        """
        # It may raise, and must not once a part of the model is mixed.
        self.refresh()
        applied = [getattr(rules, name) for name in names]
        mixing, contributing = "mix" in names, "contribute" in names and self._workers > 1
        probes: list[Tensor] = []
        squares: list[Tensor] = []
        with torch.no_grad(), record_function(f"commhooks::{'+'.join(names)}"):
            for bucket in self.buckets:
                for chunk in bucket.gathered():
                    x, vectors = chunk.x, chunk.vectors
                    probes.append(finiteness(x))
                    if mixing:
                        difference = torch.sub(x, vectors[rules.reference], out=chunk.spare)
                        squares.append(squared_norm(difference))
                    for rule in applied:
                        rule(x=x, **vectors)
                    if contributing:
                        # Divided before the sum, which then overflows where the mean does.
                        vectors["wire"].mul_(1.0 / self._workers)
                    if mixing:
                        chunk.write_back()
            if mixing:
                self.squared_distance = HostCopy(total(squares, self.device))
        return probes
