"""What the library itself costs: a step, a boundary, memory. Nothing here waits for a network."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

import commhooks
from benchmark.loads import Pretend
from benchmark.memory import live_bytes, peak_bytes, reset_peak
from commhooks import CommHookState

__all__ = [
    "Boundary",
    "Overhead",
    "SharedBoundary",
    "boundaries",
    "overheads",
    "shared_boundaries",
]

_ALGORITHMS: dict[str, Callable[[], CommHookState]] = {
    "LocalSGD": lambda: commhooks.LocalSGD(1, warmup_steps=1),
    "OverlapLocalSGD": lambda: commhooks.OverlapLocalSGD(1, warmup_steps=1),
    "OverlapLocalSGD, beta=0.7": lambda: commhooks.OverlapLocalSGD(1, beta=0.7, warmup_steps=1),
    "OverlapLocalSGD, int8": lambda: commhooks.OverlapLocalSGD(
        1, warmup_steps=1, compression="int8"
    ),
    "OverlapLocalSGD, int4": lambda: commhooks.OverlapLocalSGD(
        1, warmup_steps=1, compression="int4"
    ),
    "EASGD": lambda: commhooks.EASGD(1, warmup_steps=1),
    "CoCoDSGD": lambda: commhooks.CoCoDSGD(1, warmup_steps=1),
    "BMUF": lambda: commhooks.BMUF(1, warmup_steps=1),
    "SlowMo": lambda: commhooks.SlowMo(1, warmup_steps=1),
    "DiLoCo": lambda: commhooks.DiLoCo(1, delay=1, warmup_steps=1),
    "DiLoCo, carry": lambda: commhooks.DiLoCo(1, delay=1, merge="carry", warmup_steps=1),
    "DiLoCo, 4 fragments": lambda: commhooks.DiLoCo(1, fragments=4, delay=1, warmup_steps=1),
    "DiLoCo, 4 fragments, plain SGD": lambda: commhooks.DiLoCo(
        1, outer=partial(SGD, lr=1.0), fragments=4, delay=1, warmup_steps=1
    ),
}
# The same with and without islands.
_SHARED: dict[str, Callable[[int | None], CommHookState]] = {
    "OverlapLocalSGD": lambda island: commhooks.OverlapLocalSGD(1, warmup_steps=1, island=island),
    "DiLoCo, carry": lambda island: commhooks.DiLoCo(
        1, delay=1, merge="carry", warmup_steps=1, island=island
    ),
}
# In an optimizer's first steps the library looks for copies of the weights that it may keep.
_WATCHED_STEPS = 12
# Far from any launch.
_NEVER = 10**9
_IDLE_STATES: tuple[tuple[str, int, Callable[[], CommHookState]], ...] = (
    *(("OverlapLocalSGD", n, lambda: commhooks.OverlapLocalSGD(_NEVER)) for n in (1, 8, 64)),
    *(
        (f"DiLoCo, fragments={n}", 1, partial(commhooks.DiLoCo, _NEVER, fragments=n))
        for n in (1, 4, 64)
    ),
)
_TENSORS = 64
_TENSOR_NUMEL = 1024


@dataclass(frozen=True)
class Overhead:
    """A step that neither launches nor lands, next to one under an identity hook; medians, in µs.

    Attributes:
        state: what is registered.
        buckets: DDP's.
        identity_us: the step under an identity hook.
        difference_us: how much longer it takes under the state.
    """

    state: str
    buckets: int
    identity_us: float
    difference_us: float


@dataclass(frozen=True)
class Boundary:
    """What a boundary takes of the training thread, waiting for the all-reduce left out.

    An overlapped round is done already; a blocking one is waited for, which ``seconds_exposed``
    counts, what is chained to it included.

    Attributes:
        algorithm: whose.
        parameters: of the model.
        copy_ms: time to copy the parameters once, median.
        copies: time of a boundary in units of that; median, least and most.
        extra: bytes the state keeps, in units of the parameters' bytes.
        grown: bytes by which it grew after its first round.
        transient: the most it took besides during later rounds, in units of the parameters' bytes.
    """

    algorithm: str
    parameters: int
    copy_ms: float
    copies: tuple[float, float, float]
    extra: float
    grown: int
    transient: float


@dataclass(frozen=True)
class SharedBoundary:
    """A boundary of ranks that share the model out in an island, beside one where none do.

    Attributes:
        algorithm: whose.
        parameters: of the model.
        island: ranks that share it out.
        alone_ms: the boundary where every rank is a worker, waiting for the all-reduce left out.
        gather_ms: time to gather the model inside the island once, from the ranks' shares.
        shared_ms: the boundary with islands, waiting for the other islands left out.
        above: by how much that is longer, in units of the gathering; median, least and most.
        extra_alone: bytes a state keeps without islands, in units of the parameters' bytes.
        extra_shared: the same with islands.
    """

    algorithm: str
    parameters: int
    island: int
    alone_ms: float
    gather_ms: float
    shared_ms: float
    above: tuple[float, float, float]
    extra_alone: float
    extra_shared: float


class _Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(_TENSOR_NUMEL) for _ in range(_TENSORS))

    def forward(self) -> Tensor:
        return torch.stack([part.sum() for part in self.parts]).sum()


class _Idle(Optimizer):
    """Steps without doing anything, so that only the hooks on it are timed."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


def overheads(steps: int) -> Iterator[dict[str, Any]]:
    """Step overhead by DDP's buckets and by fragments, each over ``steps`` interleaved steps."""
    for name, buckets, build in _IDLE_STATES:
        cap_mb = _TENSORS * _TENSOR_NUMEL * 4 / 2**20 / buckets
        identity, calls = _identity()
        plain = _model(_Sum(), cap_mb)
        plain.register_comm_hook(None, identity)
        plain_optimizer = SGD(plain.parameters(), lr=0.0)
        hooked = _model(_Sum(), cap_mb)
        optimizer = SGD(hooked.parameters(), lr=0.0)
        state = build()
        state.register(hooked, optimizer)
        # Past DDP's rebuilding of its buckets.
        for _ in range(5):
            _step_us(plain, plain_optimizer)
            _step_us(hooked, optimizer)
        calls.clear()
        times = [
            (_step_us(plain, plain_optimizer), _step_us(hooked, optimizer)) for _ in range(steps)
        ]
        yield asdict(
            Overhead(
                state=name,
                buckets=len(calls) // steps,
                identity_us=statistics.median(theirs for theirs, _ in times),
                # Of pairs, so that a slow stretch of the machine weighs on both sides.
                difference_us=statistics.median(ours - theirs for theirs, ours in times),
            )
        )


def boundaries(blocks: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Boundary time and memory of every algorithm, on a model of ``blocks`` 0.55 M parameters."""
    for name, build in _ALGORITHMS.items():
        yield asdict(_boundary(name, build(), blocks, rounds))


def shared_boundaries(blocks: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Boundaries of islands, one a machine, beside those where every rank is a worker.

    On a model of ``blocks`` 0.55 M parameters, both in turn, ``rounds`` times.
    """
    island = int(os.environ["LOCAL_WORLD_SIZE"])
    for name, build in _SHARED.items():
        yield asdict(_shared_boundary(name, build, island, blocks, rounds))


def _shared_boundary(
    name: str, build: Callable[[int | None], CommHookState], island: int, blocks: int, rounds: int
) -> SharedBoundary:
    alone, shared = _Idling(build(None), blocks), _Idling(build(island), blocks)
    group, _ = dist.new_subgroups(group_size=island)  # type: ignore[no-untyped-call]
    whole = torch.zeros(-(-alone.size // 4 // island) * island)
    share = whole.chunk(island)[dist.get_rank(group)].clone()

    def gather() -> None:
        dist.all_gather_single(whole, share, group=group)

    # The first finds connections that are not open yet.
    gather()
    times = []
    for _ in range(rounds):
        without, within = alone.boundary(), shared.boundary()
        dist.barrier()
        times.append((without, _seconds(gather), within))
    without, gathering, within = (statistics.median(column) for column in zip(*times, strict=True))
    above = [(longer - shorter) / gathering for shorter, _, longer in times]
    return SharedBoundary(
        algorithm=name,
        parameters=alone.size // 4,
        island=island,
        alone_ms=without * 1e3,
        gather_ms=gathering * 1e3,
        shared_ms=within * 1e3,
        above=(statistics.median(above), min(above), max(above)),
        extra_alone=alone.extra / alone.size,
        extra_shared=shared.extra / shared.size,
    )


def _boundary(name: str, state: CommHookState, blocks: int, rounds: int) -> Boundary:
    idling = _Idling(state, blocks)
    copies = [torch.empty_like(p) for p in idling.parameters]
    boundary_times, copy_times, transients = [], [], []
    after_first = live_bytes()
    for _ in range(rounds):
        boundary_times.append(idling.boundary())
        transients.append(idling.transient)
        copy_times.append(_seconds(lambda: torch._foreach_copy_(copies, idling.parameters)))
    grown = live_bytes() - after_first
    copy = statistics.median(copy_times)
    in_copies = [seconds / copy for seconds in boundary_times]
    return Boundary(
        algorithm=name,
        parameters=idling.size // 4,
        copy_ms=copy * 1e3,
        copies=(statistics.median(in_copies), min(in_copies), max(in_copies)),
        extra=idling.extra / idling.size,
        grown=grown,
        transient=max(transients) / idling.size,
    )


class _Idling:
    """A state on a model that computes nothing, with its first rounds behind it.

    Attributes:
        parameters: of the model.
        size: bytes of them.
        extra: bytes that the state keeps.
        transient: the most bytes that the last round took besides.
    """

    def __init__(self, state: CommHookState, blocks: int) -> None:
        self._state = state
        self._model = _model(Pretend(0.0, blocks), 25.0)
        self.parameters = [p.detach() for p in self._model.parameters()]
        self.size = sum(p.numel() * p.element_size() for p in self.parameters)
        self.transient = 0
        self._optimizer = _Idle(self._model.parameters(), {})
        self._batch = torch.ones(1, requires_grad=True)
        state.register(self._model, self._optimizer)
        # A step of warm-up, for the gradients.
        self._backward()
        self._optimizer.step()
        # The model of the algorithm before was part of a cycle.
        gc.collect()
        before = live_bytes()
        self._backward()
        self._optimizer.step()
        self._land()
        self.extra = live_bytes() - before
        for _ in range(_WATCHED_STEPS):
            self.boundary()

    def boundary(self) -> float:
        """Seconds of the next, waiting for the other workers left out."""
        self._backward()
        dist.barrier()
        resident = reset_peak()
        waited = self._state.stats.seconds_exposed
        seconds = _seconds(self._optimizer.step)
        seconds -= self._state.stats.seconds_exposed - waited
        self._land()
        self.transient = peak_bytes() - resident
        return seconds

    def _backward(self) -> None:
        self._model(self._batch).sum().backward()

    def _land(self) -> None:
        while self._state.stats.rounds_completed < self._state.stats.rounds_launched:
            time.sleep(0.001)
        dist.barrier()


def _model(module: nn.Module, cap_mb: float) -> DistributedDataParallel:
    return DistributedDataParallel(
        module, init_sync=False, bucket_cap_mb=cap_mb, gradient_as_bucket_view=True
    )


def _identity() -> tuple[Callable[..., Any], list[int]]:
    calls: list[int] = []

    def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        calls.append(bucket.index())
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    return hook, calls


def _step_us(model: DistributedDataParallel, optimizer: Optimizer) -> float:
    def step() -> None:
        model().backward()
        optimizer.step()
        optimizer.zero_grad()

    return _seconds(step) * 1e6


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
