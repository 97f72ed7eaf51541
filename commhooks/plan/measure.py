"""The figures that the cost model needs, measured on the machines that will train.

A launcher starts it on every machine, as it would start the training. All ranks take part in all of
it, and all end with the same figures: those of the slowest rank.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
import torch.distributed as dist

from commhooks.engine.network.agreement import by_rank
from commhooks.errors import CommHooksError
from commhooks.plan.model import Network
from commhooks.together import gathered

__all__ = ["Launch", "MeasureError", "Measured", "figures", "launched", "measure"]

_START = "torchrun --nproc-per-node 2 -m commhooks.plan --measure --params 11e6 --step-ms 300"

# A larger model is measured by a part of it, which takes as long as it needs to show the rate.
_MOST_BYTES = 100 * 2**20
_BUCKET_BYTES = 25 * 2**20
# Repetitions end early when so many seconds are over, as on a very slow link.
_SECONDS = 20.0
_ROUNDS = 5
_MESSAGES = 20
_STEPS = 10
# The first steps of a model allocate memory and choose kernels.
_WARM_UP = 2

T = TypeVar("T")


class MeasureError(CommHooksError, RuntimeError):
    """Nothing could be measured; the message says what to do."""


@dataclass(frozen=True)
class Launch:
    """This process among those of a launch.

    Attributes:
        rank: of this process.
        ranks: number of processes.
        local_rank: of this process on its machine.
        per_node: number of processes on this machine.
    """

    rank: int
    ranks: int
    local_rank: int
    per_node: int

    @property
    def machines(self) -> list[range]:
        """The ranks of every machine; launchers number them machine by machine."""
        return [range(at, at + self.per_node) for at in range(0, self.ranks, self.per_node)]

    @property
    def peers(self) -> list[range]:
        """The l-th ranks of all machines, for every l."""
        return [range(place, self.ranks, self.per_node) for place in range(self.per_node)]


@dataclass(frozen=True)
class Measured:
    """What the ranks found.

    Attributes:
        network: between the machines and, where they hold several ranks each, inside one.
        step: seconds of a step without communication.
        backend: of the process group.
    """

    network: Network
    step: float
    backend: str


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """This process, as torchrun and ``accelerate launch`` tell it in the environment.

    Raises:
        MeasureError: no launcher started it, or it is alone.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    missing = [n for n in (*names, "MASTER_ADDR", "MASTER_PORT") if not environment.get(n)]
    if missing:
        raise MeasureError(
            f"--measure runs on all ranks, and no launcher has set {', '.join(missing)}; start it "
            f"as you start your training, such as: {_START}"
        )
    launch = Launch(*(int(environment[name]) for name in names))
    if launch.ranks < 2:
        raise MeasureError(f"--measure needs 2 ranks at least, and this is the only one: {_START}")
    return launch


def measure(launch: Launch, payload: float, step: float | str) -> Measured:
    """Measure the network and, where ``step`` names a function, a step. Collective.

    Args:
        launch: this process among the others.
        payload: bytes of the parameters.
        step: seconds of a step without communication; or ``"module:function"``, a function of no
            argument that makes one, imported from the current folder.

    Raises:
        MeasureError: on every rank, whichever of them it was that failed.
    """
    with _process_group(launch) as device:
        return figures(launch, payload, step, device)


def figures(launch: Launch, payload: float, step: float | str, device: torch.device) -> Measured:
    """What :func:`measure` measures, over a process group that exists."""
    sizes = sorted(set(gathered(launch.per_node)))
    if len(sizes) > 1:
        raise MeasureError(f"the machines hold different numbers of ranks, {sizes}")
    seconds = _step_seconds(step, device) if isinstance(step, str) else step
    islands = 1 < launch.per_node < launch.ranks
    between = _between_and_inside if islands else _between
    return Measured(between(launch, payload, device), seconds, dist.get_backend())


@contextmanager
def _process_group(launch: Launch) -> Iterator[torch.device]:
    """A process group of all ranks for the time of the block, and the device of its tensors."""
    on_gpus = torch.cuda.device_count() >= launch.per_node
    device = torch.device("cuda", launch.local_rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo", device_id=device if on_gpus else None)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _between(launch: Launch, payload: float, device: torch.device) -> Network:
    """The links of ranks that are workers by themselves."""
    world = dist.group.WORLD
    latency = _all_reduce_seconds(4, world, device, _MESSAGES) / (2 * (launch.ranks - 1))
    bare = Network(launch.ranks, 1.0, latency)
    return _with_rate(bare, payload, 1, world, device)


def _between_and_inside(launch: Launch, payload: float, device: torch.device) -> Network:
    """The links of machines, which their ranks share, and those inside a machine.

    The peers average a share of the model each, all at the same time, as the ranks of islands do.
    """
    peers, machine = _own(launch.peers, launch.rank), _own(launch.machines, launch.rank)
    count = len(launch.machines)
    latency = _all_reduce_seconds(4, peers, device, _MESSAGES) / (2 * (count - 1))
    bare = Network(count, 1.0, latency)
    between = _with_rate(bare, payload, launch.per_node, peers, device)
    inside = _with_rate(Network(launch.per_node, 1.0), payload, 1, machine, device)
    return Network(
        launch.ranks,
        between.bandwidth,
        latency,
        per_node=launch.per_node,
        inside=inside.bandwidth,
    )


def _with_rate(
    bare: Network,
    payload: float,
    shares: int,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Network:
    """``bare`` with the bandwidth at which all ``shares`` together take as long as measured."""
    size = min(payload, _MOST_BYTES)
    seconds = _all_reduce_seconds(size / shares, group, device, _ROUNDS)
    return Network(bare.ranks, bare.rate_of(size, seconds), bare.latency)


def _own(groups: Sequence[range], rank: int) -> dist.ProcessGroup | None:
    """The group that ``rank`` is in; every rank has to make all of them, in the same order."""
    made = {ranks: dist.new_group(list(ranks)) for ranks in groups}
    mine: dist.ProcessGroup = next(group for ranks, group in made.items() if rank in ranks)
    return mine


def _all_reduce_seconds(
    size: float, group: dist.ProcessGroup | None, device: torch.device, repetitions: int
) -> float:
    """An all-reduce of ``size`` bytes in buckets, all in flight at once, as in a round."""
    numbers = torch.zeros(max(1, round(size / 4)), device=device)
    buckets = torch.split(numbers, _BUCKET_BYTES // 4)

    def all_reduce() -> None:
        works = [dist.all_reduce(each, group=group, async_op=True) for each in buckets]
        for work in works:
            if work is not None:
                work.wait()

    return _seconds(all_reduce, device, repetitions)


def _step_seconds(name: str, device: torch.device) -> float:
    step = _everywhere(f"the step function {name}", lambda: _imported(name))

    def warm_up() -> None:
        for _ in range(_WARM_UP):
            step()

    _everywhere(f"a call of {name}", warm_up)
    return _seconds(step, device, _STEPS)


def _seconds(action: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """The median of what ``action`` takes on the slowest rank."""
    found: list[float] = []
    while len(found) < repetitions and sum(found) < _SECONDS:
        dist.barrier()
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=device)
        # The same number on every rank, so that all of them end the loop together.
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        found.append(taken.item())
    return median(found)


def _everywhere(what: str, action: Callable[[], T]) -> T:
    """What ``action`` returns, if it fails on no rank; otherwise an error on every rank."""
    value: T | None = None
    failure: str | None = None
    try:
        value = action()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the other ranks must hear of any
        failure = f"{type(error).__name__}: {error}"
    failures = gathered(failure)
    if any(failures):
        raise MeasureError(f"{what} failed: {by_rank(failures)}")
    return value  # type: ignore[return-value]


def _imported(name: str) -> Callable[[], object]:
    module, _, function = name.partition(":")
    # What `python -m` would do; PYTHONSAFEPATH and some launchers leave it out.
    sys.path.insert(0, str(Path.cwd()))
    found: object = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise TypeError(f"{name} is no function")
    return found
