"""All contenders on the same work in the same processes, one after the other, again and again."""

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmark.contenders import ALONE, BASELINE, Contender
from benchmark.loads import LoadName, Pretend, build_load
from benchmark.memory import peak_bytes, release, reset_peak
from benchmark.trainee import Trainee, trained
from commhooks import Stats
from network.switch import sent_bytes

__all__ = ["Race", "Sample", "race"]

# PowerSGD compresses from its third step; DDP has rebuilt its buckets by then.
_WARMUP_STEPS = 3
_BASELINE_EVERY = 4
# What our states cut the model into.
_BUCKET_NUMEL = 25 * 2**20 // 4


@dataclass(frozen=True)
class Race:
    """How the contenders are measured.

    Attributes:
        load: what is trained.
        step_seconds: a step's time on the pretend accelerator.
        size: scales the pretend accelerator's parameters.
        tau: steps between averagings.
        repeats: how often every contender has its turn.
        windows: rounds timed at each turn of an overlapped contender.
        counted: whether the interface has a counter.
        only: parts of contenders' names; empty for all.
        exactly: whether these are whole names; then others have no turn, nor has an all-reduce
            alone.
    """

    load: LoadName
    step_seconds: float
    size: float
    tau: int
    repeats: int
    windows: int
    counted: bool
    only: tuple[str, ...] = ()
    exactly: bool = False


@dataclass(frozen=True)
class Sample:
    """One stretch of steps of one contender, as the slowest rank saw it.

    Attributes:
        contender: its name.
        kind: when it communicates.
        repeat: which turn it was.
        steps: how many.
        seconds: how long they took.
        exposed: seconds its training thread waited for one synchronisation, as our states count;
            None for others.
        hidden: seconds a synchronisation went on unnoticed, likewise.
        sent: bytes that left a rank for one synchronisation, mean over ranks; None if not counted.
        peak_sent: the most that left a rank during one step, likewise.
        peak: the most memory the turn took, over all it began with, largest of the ranks, in bytes.
        parameters: of the model, in bytes.
    """

    contender: str
    kind: str
    repeat: int
    steps: int
    seconds: float
    exposed: float | None
    hidden: float | None
    sent: float | None
    peak_sent: float | None
    peak: int
    parameters: int


def race(plan: Race, contenders: list[Contender]) -> Iterator[dict[str, Any]]:
    """Measure; yields samples as plain values, on every rank the same."""
    baseline = next(contender for contender in contenders if contender.name == BASELINE)
    chosen = [contender for contender in contenders if _chosen(contender, plan)]
    # The first steps of a process find cold caches and memory that it does not have yet.
    _turn(plan, baseline, 0)
    for repeat in range(plan.repeats):
        if not plan.exactly:
            yield from (asdict(sample) for sample in _alone(plan, repeat))
        for number, contender in enumerate(chosen):
            # Often enough that no stretch of the machine's is compared with another one's.
            turns = [contender] if number % _BASELINE_EVERY else [baseline, contender]
            for turn in turns:
                yield from (asdict(sample) for sample in _turn(plan, turn, repeat))


def _chosen(contender: Contender, plan: Race) -> bool:
    if contender.name == BASELINE:
        return False
    if plan.exactly:
        return contender.name in plan.only
    return not plan.only or any(part in contender.name for part in plan.only)


def _turn(plan: Race, contender: Contender, repeat: int) -> list[Sample]:
    release()
    resident = reset_peak()
    torch.manual_seed(0)
    load = build_load(plan.load, plan.step_seconds, plan.size)
    with trained(contender, load, plan.tau) as trainee:
        turn = _Turn(plan, contender, trainee)
        turn.warm_up()
        times, stats = turn.windows()
        sent = turn.sent_per_synchronisation()
        peak_sent = turn.sent_in_one_step()
        mine = {
            "times": times,
            "sent": sent,
            "peak_sent": peak_sent,
            "peak": peak_bytes() - resident,
        }
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
    # What is in flight at the end has been neither waited for nor used.
    unused = 1 if contender.kind == "overlapped" else 0
    rounds: float = 1
    if stats:
        used = stats.rounds_launched - unused
        # Of the whole model, which takes one round of every fragment.
        rounds = stats.step if contender.kind == "step" else used / contender.fragments
    return [
        Sample(
            contender=contender.name,
            kind=contender.kind,
            repeat=repeat,
            steps=turn.steps_per_window,
            seconds=max(rank["times"][window] for rank in ranks),
            exposed=stats.seconds_exposed / rounds if stats else None,
            hidden=stats.seconds_hidden / rounds if stats else None,
            sent=None if sent is None else sum(rank["sent"] for rank in ranks) / len(ranks),
            peak_sent=(
                None if peak_sent is None else sum(rank["peak_sent"] for rank in ranks) / len(ranks)
            ),
            peak=max(rank["peak"] for rank in ranks),
            parameters=trainee.parameter_bytes,
        )
        for window in range(len(times))
    ]


def _alone(plan: Race, repeat: int) -> Iterator[Sample]:
    """The model's all-reduce with nothing beside it, spread over tau steps."""
    model = build_load(plan.load, plan.step_seconds, plan.size).model
    numbers = sum(p.numel() for p in model.parameters())
    machine = int(os.environ["LOCAL_WORLD_SIZE"])
    places = [list(range(place, dist.get_world_size(), machine)) for place in range(machine)]
    peers, _ = dist.new_subgroups_by_enumeration(places)  # type: ignore[no-untyped-call]
    share = torch.zeros(numbers // machine)
    for _ in range(plan.windows):
        dist.barrier()
        before = sent_bytes() if plan.counted else 0
        start = time.perf_counter()
        buckets = torch.split(share, _BUCKET_NUMEL)
        for work in [dist.all_reduce(b, group=peers, async_op=True) for b in buckets]:
            work.wait()
        mine = (
            time.perf_counter() - start,
            sent_bytes() - before if plan.counted else None,
        )
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        sent = [bytes_ for _, bytes_ in ranks]
        yield Sample(
            contender=ALONE,
            kind="alone",
            repeat=repeat,
            steps=plan.tau,
            seconds=max(seconds for seconds, _ in ranks),
            exposed=None,
            hidden=None,
            sent=sum(sent) / len(sent) if plan.counted else None,
            peak_sent=None,
            peak=0,
            parameters=numbers * share.element_size(),
        )
    dist.destroy_process_group(peers)


class _Turn:
    """One contender's turn on this rank."""

    def __init__(self, plan: Race, contender: Contender, trainee: Trainee) -> None:
        self._plan, self._kind = plan, contender.kind
        self._fragments = contender.fragments
        self._trainee = trainee
        per_step = contender.kind == "step"
        self.steps_per_window = 1 if per_step else plan.tau
        self._windows = 3 if per_step else 1 if contender.kind == "blocking" else plan.windows
        self._before = 0
        self._after = 0
        self._at_first = self._count()

    def warm_up(self) -> None:
        """Until the contender's pace is its usual one; a blocking one's needs no compute."""
        steps = _WARMUP_STEPS
        if self._kind == "overlapped":
            # Ends right after a boundary, with a round in flight, and so does every window.
            steps = self._plan.tau
        elif isinstance(self._trainee.load.model, Pretend):
            self._trainee.load.model.computing(False)
        for _ in range(steps):
            self._trainee.step()
        if isinstance(self._trainee.load.model, Pretend):
            self._trainee.load.model.computing(True)
        if self._kind != "overlapped":
            # With a round in flight a barrier would only queue behind it.
            dist.barrier()
        self._before = self._count()

    def windows(self) -> tuple[list[float], Stats | None]:
        """Seconds of each stretch, and our states' counters at the end."""
        times = []
        for _ in range(self._windows):
            start = time.perf_counter()
            for _ in range(self.steps_per_window):
                self._trainee.step()
            times.append(time.perf_counter() - start)
        state = self._trainee.state
        stats = None if state is None else state.stats
        if self._kind == "overlapped":
            self._land()
        self._after = self._count()
        return times, stats

    def sent_per_synchronisation(self) -> float | None:
        """Bytes this rank put on the wire for one all-reduce of the model or of the gradients."""
        if not self._plan.counted:
            return None
        state = self._trainee.state
        if state is not None and self._kind == "overlapped":
            # A round is in flight at the start already, so count from before the first.
            return (self._after - self._at_first) * self._fragments / state.stats.rounds_launched
        return (self._after - self._before) / self._windows

    def sent_in_one_step(self) -> float | None:
        """The most bytes this rank put on the wire during one of the next steps.

        To read the counter takes a process, so these steps are no part of what is timed.
        """
        if not self._plan.counted:
            return None
        peak = 0
        # One more, since what ours launch after the last step leaves during the next.
        ours = self._kind == "overlapped" and self._trainee.state is not None
        for _ in range(self.steps_per_window + ours):
            before = self._count()
            self._trainee.step()
            peak = max(peak, self._count() - before)
        # The next contender is not to share its link with what was launched last.
        self._land()
        return peak

    def _land(self) -> None:
        """Let what is in flight arrive, so that its bytes are counted, and as this contender's."""
        state = self._trainee.state
        if state is None or self._kind == "step":
            # torchft's last round has been used; the window ends with nothing in flight.
            return
        while state.stats.rounds_completed < state.stats.rounds_launched:
            time.sleep(0.01)
        # The other ranks of a machine may still be sending over the link whose bytes are counted.
        dist.barrier()

    def _count(self) -> int:
        return sent_bytes() if self._plan.counted else 0
