"""What the library itself costs: a step, a boundary, memory. Nothing here waits for a network."""

import gc
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

__all__ = ["Boundary", "Overhead", "boundaries", "overheads"]

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


def _boundary(name: str, state: CommHookState, blocks: int, rounds: int) -> Boundary:
    model = _model(Pretend(0.0, blocks), 25.0)
    parameters = [p.detach() for p in model.parameters()]
    size = sum(p.numel() * p.element_size() for p in parameters)
    optimizer = _Idle(model.parameters(), {})
    batch = torch.ones(1, requires_grad=True)
    copies = [torch.empty_like(p) for p in parameters]

    def land() -> None:
        while state.stats.rounds_completed < state.stats.rounds_launched:
            time.sleep(0.001)
        dist.barrier()

    state.register(model, optimizer)
    # A step of warm-up, for the gradients.
    model(batch).sum().backward()
    optimizer.step()
    # The model of the algorithm before was part of a cycle.
    gc.collect()
    before = live_bytes()
    model(batch).sum().backward()
    optimizer.step()
    land()
    after_first = live_bytes()
    boundary_times, copy_times, transients = [], [], []
    for _ in range(rounds):
        model(batch).sum().backward()
        dist.barrier()
        resident = reset_peak()
        waited = state.stats.seconds_exposed
        boundary = _seconds(optimizer.step)
        boundary_times.append(boundary - (state.stats.seconds_exposed - waited))
        land()
        transients.append(peak_bytes() - resident)
        copy_times.append(_seconds(lambda: torch._foreach_copy_(copies, parameters)))
    grown = live_bytes() - after_first
    copy = statistics.median(copy_times)
    in_copies = [seconds / copy for seconds in boundary_times]
    return Boundary(
        algorithm=name,
        parameters=size // 4,
        copy_ms=copy * 1e3,
        copies=(statistics.median(in_copies), min(in_copies), max(in_copies)),
        extra=(after_first - before) / size,
        grown=grown,
        transient=max(transients) / size,
    )


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
