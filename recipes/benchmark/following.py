"""A run whose tau follows a link that changes, step by step."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import commhooks
from benchmark.loads import build_load

__all__ = ["StepRecord", "follow"]


@dataclass(frozen=True)
class StepRecord:
    """What rank 0 knows after a step.

    Attributes:
        seconds: since its process was started, from when the link's changes count.
        step: its number.
        tau: in force.
        rounds: launched so far.
        exposed: seconds waited so far.
        round_seconds, step_seconds: as in ``state.stats``.
    """

    seconds: float
    step: int
    tau: int
    rounds: int
    exposed: float
    round_seconds: float
    step_seconds: float


def follow(
    seconds: float, step_seconds: float, size: float, tau: int | str
) -> Iterator[dict[str, Any]]:
    """Train on the pretend accelerator; yields a record a step.

    Args:
        seconds: how long, since the process was started.
        step_seconds: of the pretend accelerator.
        size: of its model.
        tau: of Overlap-Local-SGD; "auto" follows the link.
    """
    started = psutil.Process().create_time()
    load = build_load("pretend", step_seconds, size)
    model = DistributedDataParallel(load.model, init_sync=False, forward_sync_buffers=False)
    optimizer = SGD(model.parameters(), lr=1e-3)
    state = commhooks.OverlapLocalSGD(tau=tau)  # type: ignore[arg-type]
    state.register(model, optimizer)
    # Rank 0 says when it is over, since clocks differ.
    over = torch.zeros(1)
    while not over.item():
        load.loss(model(load.batch)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        stats = state.stats
        now = time.time() - started
        yield asdict(
            StepRecord(
                now,
                stats.step,
                stats.tau,
                stats.rounds_launched,
                stats.seconds_exposed,
                stats.round_seconds,
                stats.step_seconds,
            )
        )
        if stats.step % _LOOKS_EVERY == 0:
            over.fill_(float(now > seconds))
            torch.distributed.broadcast(over, src=0)
    state.finish()


# Steps from one look at rank 0's clock to the next.
_LOOKS_EVERY = 50
