"""Two rounds under ``torch.profiler``: what the training thread and the backend's threads do."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile, record_function

import commhooks
from benchmark.loads import Pretend

__all__ = ["Span", "trace"]

_STEP = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Span:
    """Something that a thread did.

    Attributes:
        name: what, by the names in the profile.
        thread: number of the thread; the training thread's is the lowest.
        start: seconds from the beginning of the profile.
        end: likewise.
    """

    name: str
    thread: int
    start: float
    end: float


def trace(step_seconds: float, size: float, tau: int, chrome: str) -> Iterator[dict[str, Any]]:
    """The steps of two rounds of Overlap-Local-SGD, and one step more, as plain values.

    Args:
        step_seconds: of the pretend accelerator.
        size: scales its parameters.
        tau: steps in a round.
        chrome: file that rank 0 writes the whole profile to, for https://ui.perfetto.dev.
    """
    module = Pretend(step_seconds, max(1, round(20 * size)))
    model = DistributedDataParallel(module, init_sync=False)
    optimizer = SGD(model.parameters(), lr=1e-3)
    state = commhooks.OverlapLocalSGD(tau, beta=0.7)
    state.register(model, optimizer)
    batch = torch.ones(1, requires_grad=True)

    def step() -> None:
        with record_function("forward"):
            loss = model(batch).sum()
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    # Up to the boundary that launches the first round, so that one is in flight from the start.
    for _ in range(tau):
        step()
    # What is chained to a round runs on the backend's threads.
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, experimental_config=everywhere) as profiler:
        for _ in range(2 * tau + 1):
            step()
    state.finish()
    if dist.get_rank() == 0:
        profiler.export_chrome_trace(chrome)
    for event in profiler.events() or ():
        if event.name in _STEP or event.name.startswith("commhooks::"):
            start, end = event.time_range.start, event.time_range.end
            yield asdict(Span(event.name, event.thread, start / 1e6, end / 1e6))
