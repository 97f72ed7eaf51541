"""How long the other workers wait where one is slow, or stops now and then: the ranks' part."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

from benchmark.contenders import BASELINE, Contender
from benchmark.loads import build_load
from benchmark.memory import release
from benchmark.trainee import trained

__all__ = ["CASES", "Case", "SlowWorker", "pauses_at", "slow_worker"]

Case = Literal["slower", "stopped", "in-turn"]
"""``slower``: the last worker's steps take twice as long; ``stopped``: it pauses now and then;
``in-turn``: now one worker pauses, now another."""
CASES: tuple[Case, ...] = get_args(Case)
_SLOWER = 2
_BASELINE_EVERY = 4


@dataclass(frozen=True)
class SlowWorker:
    """What the contenders have to cope with, and for how long.

    Attributes:
        case: in which way a worker is slow.
        step_seconds: of a worker that is not.
        size: scales the pretend accelerator's parameters.
        tau: steps between averagings.
        warmup: steps before those that are timed. What a worker may be ahead of another one is used
            up in them, so that they do not look like the rest of a long run.
        steps: how many are timed.
        pause_every: steps from one pause to the next.
        pause_steps: length of a pause, in steps.
        only: the contenders' names.
    """

    case: Case
    step_seconds: float
    size: float
    tau: int
    warmup: int
    steps: int
    pause_every: int
    pause_steps: float
    only: tuple[str, ...]


def slow_worker(plan: SlowWorker, contenders: list[Contender]) -> Iterator[dict[str, Any]]:
    """One record a turn: every rank's seconds for all timed steps.

    A contender has one turn; no communication has several, in the course of the whole.
    """
    by_name = {contender.name: contender for contender in contenders}
    # The first steps of a process find cold caches and memory that it does not have yet.
    _seconds(plan, by_name[BASELINE], warmup=1, steps=plan.tau)
    for name in _turns(plan.only):
        seconds = _seconds(plan, by_name[name], warmup=plan.warmup, steps=plan.steps)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, seconds)
        yield {
            "case": plan.case,
            "contender": name,
            "kind": by_name[name].kind,
            "steps": plan.steps,
            "seconds": ranks,
        }


def _turns(names: Sequence[str]) -> Iterator[str]:
    """The contenders, and no communication at both ends and between."""
    for number, name in enumerate(names):
        if number % _BASELINE_EVERY == 0:
            yield BASELINE
        yield name
    yield BASELINE


def _seconds(plan: SlowWorker, contender: Contender, *, warmup: int, steps: int) -> float:
    release()
    torch.manual_seed(0)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    slower = _SLOWER if plan.case == "slower" and rank == ranks - 1 else 1
    load = build_load("pretend", slower * plan.step_seconds, plan.size)
    with trained(contender, load, plan.tau) as trainee:
        dist.barrier()
        start = 0.0
        for step in range(warmup + steps):
            if step == warmup:
                start = time.perf_counter()
            if pauses_at(plan, step, rank, ranks):
                # As for a late batch or a checkpoint: the backend's threads go on.
                time.sleep(plan.pause_steps * plan.step_seconds)
            trainee.step()
        seconds = time.perf_counter() - start
        # A round in flight would hold up what the ranks gather next.
        if trainee.state is not None:
            trainee.state.finish()
    return seconds


def pauses_at(plan: SlowWorker, step: int, rank: int, ranks: int) -> bool:
    """Whether a rank pauses before a step, counted from 0."""
    number, rest = divmod(step, plan.pause_every)
    # In the middle of a stretch, so that a pause does not begin the timed steps.
    if plan.case == "slower" or rest != plan.pause_every // 2:
        return False
    return rank == (ranks - 1 if plan.case == "stopped" else number % ranks)
