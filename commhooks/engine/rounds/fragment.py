"""A part of the model whose rounds go together: its vectors, its schedule, its round in flight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from commhooks.engine.guards.process_exit import landing
from commhooks.engine.network.communicator import Communicator
from commhooks.engine.network.report import Report
from commhooks.engine.network.ticket import total
from commhooks.engine.network.wires import CompressedWire, Wire
from commhooks.engine.rounds.drift import Drift, stride_for
from commhooks.engine.rounds.findings import Findings, findings_of
from commhooks.engine.rounds.gathering import Gathering, offer
from commhooks.engine.rounds.rates import (
    agreed_rates,
    plain_rates,
    rate_changes,
    rates_tensor,
    told_rates,
)
from commhooks.engine.rounds.round import Round
from commhooks.engine.rounds.schedule import Schedule
from commhooks.engine.rules import Kept, Part, Rules, weight_in_background
from commhooks.engine.vectors.buckets import Bucket
from commhooks.engine.vectors.chunks import Gathered
from commhooks.engine.vectors.devices import HostCopy, finiteness
from commhooks.errors import RegistrationError

__all__ = ["Fragment"]


class Fragment:
    """Some parameters in flat buckets, and the rules that are applied to them.

    Attributes:
        buckets: the parameters, with the vectors that go with them.
        schedule: when rounds are launched and land.
        round: what is in flight; None once it has been waited for.
        gathering: what the ranks of an island gather of each other for the next landing; None if
            they have not begun.
        kept: what the algorithm keeps besides vectors.
        rates: the learning rates at the last launch, one a parameter, as the workers have agreed on
            them; None before the first one.
        squared_distance: of the parameters to what they were last drawn to.
        drifts: one a bucket, which measure how far this worker moves from the others.
        findings: what the ranks told with the last round that has landed; None where the algorithm
            has begun anew since.
        seen: what they told last, for users to look at; nothing is decided by it.
        round_seconds: how long that one was in flight; 0 if there was none.
        shapes: the parameters'.
        device: where they lie, or the first of them.

    Args:
        parameters: those that go together.
        buckets: the same, in flat vectors.
        schedule: when rounds are launched and land.
        make_wire: makes what turns a bucket's vector into its mean.
        divisor: by what the vectors are divided before they are sent.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        buckets: Sequence[Bucket],
        schedule: Schedule,
        make_wire: Callable[[Tensor], Wire],
        divisor: int,
    ) -> None:
        parameters = list(parameters)
        self.shapes = [list(parameter.shape) for parameter in parameters]
        self.device = parameters[0].device
        self.buckets = list(buckets)
        self.schedule = schedule
        self.round: Round | None = None
        self.gathering: Gathering | None = None
        self.squared_distance: HostCopy | None = None
        self.kept: Kept | None = None
        self.rates: Tensor | None = None
        self.wires: list[Wire] = []
        self.drifts: list[Drift] = []
        self.findings: Findings | None = None
        self._newer: Findings | None = None
        self.seen: Findings | None = None
        self.round_seconds = 0.0
        self._offered = False
        self._moved_before: float | Tensor = 0.0
        self._together_before = 0.0
        self._stride = stride_for(sum(bucket.length for bucket in self.buckets))
        self._make_wire = make_wire
        self._divisor = divisor

    @property
    def parameters(self) -> list[Tensor]:
        """Those of which this rank has a share, in the order of the buckets."""
        return [tensor for bucket in self.buckets for tensor in bucket.owned]

    @property
    def fingerprint(self) -> int | Tensor:
        """A number that ranks with the same parameters, bit for bit, have in common."""
        sums = [bucket.fingerprint().to(self.device) for bucket in self.buckets]
        return torch.stack(sums).sum() if sums else 0

    @property
    def ahead(self) -> bool:
        """Whether the ranks of an island put their shares together ahead of a landing."""
        return any(bucket.ahead for bucket in self.buckets)

    @property
    def nbytes(self) -> int:
        """Bytes of what a round sends, see :class:`commhooks.engine.network.wires.Wire`."""
        return sum(wire.nbytes for wire in self.wires)

    def allocate(self, rules: Rules) -> None:
        """Make the vectors, unless they are there."""
        for bucket in self.buckets:
            if not bucket.vectors:
                bucket.allocate(("wire", *rules.vectors))
        if not self.wires:
            self.wires = [self._make_wire(bucket.vectors["wire"]) for bucket in self.buckets]
            differences = rules.contributes_differences
            self.drifts = [
                Drift(bucket, rules.reference, differences=differences, stride=self._stride)
                for bucket in self.buckets
            ]

    def start(self, rules: Rules) -> None:
        """Begin at the parameters as they are."""
        self._outdate()
        self.allocate(rules)
        self.sweep(rules, "start")
        self._restart_wires()
        self.findings = self._newer = None
        self.rates = None
        self._keep(rules)

    def prepare(
        self, rules: Rules, rates: Callable[[], Mapping[int, float]], peers: Communicator
    ) -> torch.futures.Future[Tensor] | None:
        """Show the algorithm the learning rates in force, if it looks at them.

        The workers send theirs to one another, and none of them uses its own: what follows from
        them goes into vectors that all workers share.

        Args:
            rules: the algorithm.
            rates: gives this rank's, by the ``id`` of the parameters.
            peers: the workers.

        Returns:
            What ends when the algorithm has seen them; None if it does not look.
        """
        if not (rules.looks_at_rates and self.parameters):
            return None
        by_id = rates()
        mine = [by_id.get(id(tensor)) for tensor in self.parameters]
        told = told_rates(mine, peers.rank, peers.size, self.device)

        def look(reduced: torch.futures.Future[Any]) -> Tensor:
            reduced.value()
            now = agreed_rates(told)
            changes = rate_changes(now, self.rates)
            # Read on a CPU alone: a GPU's thread that starts collectives would wait for them here.
            if changes.is_cuda or bool((changes != 1).any()):
                rules.prepare(self.parts(changes))
            self.rates = now
            return now

        return peers.all_reduce(told).then(landing(look))

    def parts(self, changes: Tensor | None = None) -> list[Part]:
        """The fragment, parameter by parameter."""
        parts: list[Part] = []
        for bucket in self.buckets:
            shaped = {name: bucket.parts(flat) for name, flat in bucket.vectors.items()}
            for number, tensor in enumerate(bucket.owned):
                vectors = {name: views[number] for name, views in shaped.items()}
                change = 1.0 if changes is None else changes[len(parts)].to(tensor.device)
                parts.append(Part(tensor, vectors, change))
        return parts

    def _restart_wires(self) -> None:
        for bucket, wire in self._compressed:
            wire.restart()
            if wire.r is not None:
                bucket.gather_share(wire.r)

    def _keep(self, rules: Rules) -> None:
        # The share of an island's rank may be empty.
        parts = self.parts()
        self.kept = rules.keep(parts) if parts else None

    @property
    def templates(self) -> list[Tensor]:
        """What any vector's parts look like, without numbers."""
        flats = (torch.empty(b.length, dtype=b.dtype, device="meta") for b in self.buckets)
        return [p for b, flat in zip(self.buckets, flats, strict=True) for p in b.parts(flat)]

    def state_dict(self, vectors: Sequence[str] | None) -> dict[str, Any]:
        """The fragment's part of a checkpoint; nothing may be in flight.

        Args:
            vectors: names of the vectors that mean something; None if the algorithm has not begun.
        """
        begun = vectors is not None
        return {
            "launch": self.schedule.launch,
            "landing": self.schedule.landing,
            "begun": self.schedule.begun,
            "findings": self.findings.state_dict() if self.findings else None,
            "newer": self._newer.state_dict() if self._newer else None,
            "seen": self.seen.state_dict() if self.seen else None,
            "moved": float(self._moved_before),
            "together": self._together_before,
            "shapes": self.shapes,
            "vectors": {name: self._dump(name) for name in vectors or ()},
            "rates": plain_rates(self.rates) if begun and self.rates is not None else None,
            "kept": copy.deepcopy(self.kept.state_dict()) if begun and self.kept else None,
            "wires": self._dump_wires() if begun else None,
        }

    def load_state_dict(
        self, saved: Mapping[str, Any], rules: Rules | None, *, residuals: bool
    ) -> None:
        """Go on from what :meth:`state_dict` gave and has been found good.

        Args:
            saved: what it gave.
            rules: the algorithm, if it had begun and goes on.
            residuals: whether what rounding has left over goes on, too.
        """
        schedule = self.schedule
        schedule.launch, schedule.landing = saved["launch"], saved["landing"]
        schedule.begun = saved["begun"]
        known = {"findings": "findings", "_newer": "newer", "seen": "seen"}
        for name, key in known.items():
            found = saved[key]
            setattr(self, name, Findings(**found) if found and residuals else None)
        self._moved_before, self._together_before = saved["moved"], saved["together"]
        self._outdate()
        if rules is None:
            return
        self.allocate(rules)
        for name, parts in saved["vectors"].items():
            views = (view for b in self.buckets for view in b.parts(b.vectors[name]))
            for view, part in zip(views, parts, strict=True):
                view.copy_(part)
        rates = saved["rates"]
        self.rates = None if rates is None else rates_tensor(rates, self.device)
        self._keep(rules)
        if self.kept is not None:
            self.kept.load_state_dict(saved["kept"])
        if saved["wires"] is not None:
            self._load_wires(saved["wires"], residuals=residuals)

    @property
    def newest_findings(self) -> Findings | None:
        """Those of a round that has been waited for ahead of its landing, if there is one.

        A rank does so alone when it saves a checkpoint, so that only :attr:`findings` are the same
        on every rank at every step.
        """
        return self._newer or self.findings

    def landed(self) -> None:
        """A round lands, on every rank at the same step."""
        self.findings, self._newer = self.newest_findings, None

    def _dump(self, name: str) -> list[Tensor]:
        """Copies of a vector, one tensor a parameter, whatever the buckets' sizes."""
        return [part for b in self.buckets for part in b.parts(b.vectors[name].clone())]

    def _dump_wires(self) -> dict[str, Any] | None:
        """What the wires have left over and in common, as copies; None if there is nothing."""
        wires = self._compressed
        if not wires:
            return None
        return {
            "e": [p for bucket, wire in wires for p in bucket.parts(wire.e.clone())],
            "E": [wire.E.clone() for _, wire in wires],
            "r": [
                p
                for bucket, wire in wires
                if wire.r is not None
                for p in bucket.parts(wire.r.clone())
            ],
        }

    def _load_wires(self, saved: Mapping[str, Any], *, residuals: bool) -> None:
        """Go on from what :meth:`_dump_wires` gave, with its residuals or with none."""
        for name in ("e", "E", "r") if residuals else ("r",):
            rest = list(saved[name])
            for bucket, wire in self._compressed:
                flat: Tensor | None = getattr(wire, name)
                if flat is None:
                    continue
                views = [flat] if name == "E" else bucket.parts(flat)
                for view, part in zip(views, rest[: len(views)], strict=True):
                    view.copy_(part)
                rest = rest[len(views) :]

    @property
    def _compressed(self) -> list[tuple[Bucket, CompressedWire]]:
        pairs = zip(self.buckets, self.wires, strict=True) if self.wires else ()
        return [(bucket, wire) for bucket, wire in pairs if isinstance(wire, CompressedWire)]

    @property
    def references(self) -> list[Tensor]:
        """The wires' references, which must be the same on all workers."""
        return [wire.r for _, wire in self._compressed if wire.r is not None]

    def release(self) -> None:
        """Let go of the vectors."""
        self.kept = None
        self.wires, self.drifts = [], []
        self.gathering = None
        for bucket in self.buckets:
            bucket.release()

    def refresh(self) -> None:
        """Find out where the parameters lie now.

        Raises:
            RegistrationError: a parameter is not what it was.
        """
        for bucket in self.buckets:
            bucket.refresh()

    def refusal(self) -> str | None:
        """Why a sweep is not possible, if it is not."""
        try:
            self.refresh()
        except RegistrationError as error:
            return str(error)
        return None

    def sweep(self, rules: Rules, *names: str) -> list[Tensor]:
        """Apply rules to the model, chunk by chunk; ``mix`` alone writes to the parameters.

        What ``contribute`` writes is made ready to be sent, while it still lies in the cache.

        Where the ranks of an island share the model out, ``mix`` takes what they have put together
        ahead of it; else this rank's share of what becomes of x is in ``common`` now, and nothing
        is written before they have put that together.

        Returns:
            Scalars that are NaN or inf if a parameter is, or if what would be sent has no meaning.
        """
        # It may raise, and must not once a part of the model is mixed.
        self.refresh()
        # Of x, where the ranks of an island have put together the rest.
        weight = weight_in_background(rules) if self.ahead else None
        mixing, launching = "mix" in names, "contribute" in names
        dividing = launching and self._divisor > 1
        probes: list[Tensor] = []
        with torch.no_grad(), record_function(f"commhooks::{'+'.join(names)}"):
            for bucket, drift, wire in zip(self.buckets, self.drifts, self.wires, strict=True):
                drift.begin()
                for chunk in bucket.gathered():
                    probes.append(finiteness(chunk.x))
                    drift.before(chunk)
                    for name in names:
                        if name == "mix" and weight is not None:
                            _mix_ahead(rules, weight, chunk)
                        else:
                            getattr(rules, name)(x=chunk.x, **chunk.vectors)
                    if dividing:
                        # Divided before the sum, which then overflows where the mean does.
                        chunk.vectors["wire"].mul_(1.0 / self._divisor)
                    if mixing and bucket.copied:
                        chunk.offer()
                    elif mixing:
                        chunk.write_back()
                drift.compare()
                if launching:
                    drift.contributed(self._divisor)
                    probes += wire.encode()
                if mixing and weight is not None:
                    bucket.mix_in_rest(weight)
        if mixing:
            self._offered, self.gathering = False, None
            self.squared_distance = HostCopy(self._squared([d.apart for d in self.drifts]))
        return probes

    def report(self, *, shared: bool) -> Report:
        """What this rank tells with the round that it launches.

        Args:
            shared: whether it has a share of an island's model. Then it knows how far all workers
                have moved together on its share alone, and tells so with the next round.
        """
        report = Report(
            apart=self._squared([drift.apart for drift in self.drifts]),
            length=self._squared([drift.length for drift in self.drifts]),
            moved=self._squared([drift.moved for drift in self.drifts]),
            round_seconds=self.round_seconds,
        )
        if shared:
            moved, self._moved_before = self._moved_before, report.moved
            report.moved, report.together = moved, self._together_before
        return report

    def _squared(self, norms: list[Tensor]) -> Tensor:
        """A squared norm of the whole fragment, from those of the numbers that were looked at."""
        return total(norms, self.device) * self._stride

    def found(self, finished: Round, islands: Sequence[Sequence[int]]) -> None:
        """Take note of what the ranks have told with a round that has been waited for."""
        self._offered = True
        self._together_before = finished.together * self._stride
        self.seen = self._newer = findings_of(finished.reports, islands, self._together_before)
        self.round_seconds = finished.arrived.seconds_since(finished.launched)

    @property
    def common(self) -> list[Tensor]:
        """The buckets' common vectors, once a sweep has made them."""
        return [bucket.common for bucket in self.buckets if bucket.common is not None]

    @property
    def gathered(self) -> bool:
        """Whether what the next landing takes has been gathered, or is on its way."""
        return self.gathering is not None and not self.gathering.outdated

    @property
    def gathers(self) -> bool:
        """Whether some of it is still on its way."""
        return self.gathering is not None and self.gathering.in_flight

    def offer(self, rules: Rules) -> None:
        """See to it that the buckets' ``common`` holds what this rank has to give for a landing."""
        if self.round is not None:
            # It has offered its result when that arrived, and so this only orders streams.
            self.round.wait()
        elif not self._offered:
            for bucket in self.buckets:
                offer(bucket, rules)
            self._offered = True

    def take_common(self) -> None:
        """Write what the ranks of an island have put together behind a sweep to the parameters."""
        self.gathering = None
        for bucket in self.buckets:
            bucket.take_common()

    def drop_gathering(self) -> None:
        """Forget what has been gathered, which all ranks do."""
        if self.gathering is not None:
            # Else it would write to vectors that the next one uses.
            with suppress(RuntimeError):
                self.gathering.wait()
        self.gathering = None

    def _outdate(self) -> None:
        """The vectors are replaced; the ranks find out together, see :class:`Sharing`."""
        self._offered = False
        if self.gathering is not None:
            self.gathering.outdated = True


def _mix_ahead(rules: Rules, weight: float, chunk: Gathered) -> None:
    """Mix to the same bits as the other ranks do; the vectors end as ``mix`` ends them.

    ``contribute`` may need both.
    """
    mixed = chunk.blend(weight, out=chunk.spare)
    rules.mix(x=chunk.x, **chunk.vectors)
    chunk.x.copy_(mixed)
