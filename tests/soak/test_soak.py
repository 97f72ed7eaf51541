"""Pins that thousands of rounds among sleeps, skips, checkpoints and evaluations stay exact.

The trajectories are those of the reference, and nothing grows.
"""

import io
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.cases import PERIODIC, Case, with_tau
from tests.expected import reference_workers
from tests.harness import run_ranks
from tests.training import Trainer
from tests.workload import plain_sgd


@dataclass(frozen=True)
class Plan:
    """What happens at which step; the same numbers on every rank and in the reference."""

    case: Case
    size: int

    @property
    def skipped(self) -> set[tuple[int, int]]:
        """(rank, step) whose optimizer step is left out, as a GradScaler does on overflow.

        None in warm-up, where gradients are averaged and an overflow would be everybody's.
        """
        chance = random.Random(1)
        steps = range(self.case.warmup_steps + 1, self.case.steps + 1)
        pairs = [(r, s) for s in steps for r in range(self.size)]
        return {pair for pair in pairs if chance.random() < 0.05}

    def at(self, kind: str, every: int) -> set[int]:
        chance = random.Random(kind)
        return {s for s in range(1, self.case.steps + 1) if chance.random() < 1 / every}


class End(NamedTuple):
    x: list[Tensor]
    rounds: tuple[int, int]
    steps: int
    resumes: int


class Soaked(Trainer):
    """Leaves out the optimizer steps of the plan as a GradScaler would, on this rank alone."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.skipped = plan.skipped
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**9)
        super().__init__(plan.case, scaler=self.scaler)

    def optimize(self) -> None:
        skipped = (self.rank, self.steps) in self.skipped
        if skipped:
            # What the scaler looks for. The scale stays 1, so that gradients are not rounded.
            next(p for p in self.model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
        for optimizer in self.optimizers:
            self.scaler.scale(torch.zeros(()))
            self.scaler.step(optimizer)
        self.scaler.update(1.0)
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def resumed(run: Soaked) -> Soaked:
    """A new model, optimizer and state from a file of the old ones."""
    file = io.BytesIO()
    torch.save(run.saved(), file)
    file.seek(0)
    again = Soaked(run.plan)
    again.go_on(torch.load(file, weights_only=True), run.steps)
    return again


def soak(plans: Sequence[Plan]) -> list[End]:
    ends = []
    for plan in plans:
        run = Soaked(plan)
        chance = random.Random(dist.get_rank())
        saves, looks = plan.at("save", 20), plan.at("look", 15)
        resumes = plan.at("resume", 150) | {plan.case.steps // 2}
        x = []
        for step in range(1, plan.case.steps + 1):
            x.append(run.step())
            if chance.random() < 0.02:
                time.sleep(chance.uniform(0, 0.01))
            if step in saves:
                run.state.state_dict()
            if step in looks:
                with run.state.averaged():
                    run.model.module(torch.zeros(1, 5, dtype=plan.case.dtype))
            if step in resumes:
                run = resumed(run)
        run.state.finish()
        stats = run.state.stats
        x.append(run.x)
        rounds = (stats.rounds_launched, stats.rounds_completed)
        ends.append(End(x, rounds, stats.step, len(resumes)))
    return ends


def check(steps: int, size: int, tau: int) -> int:
    plans = [
        Plan(
            Case(
                name,
                next(with_tau(name, tau)),
                warmup_steps=3,
                optimizers=plain_sgd,
                dtype=torch.float64,
                steps=steps,
            ),
            size,
        )
        for name in PERIODIC
    ]
    total = 0
    for plan, *ends in zip(plans, *run_ranks(soak, size, plans, timeout=1500.0), strict=True):
        case, skipped = plan.case, plan.skipped
        workers = reference_workers(case, size)
        for step in range(1, steps + 1):
            expected = workers.step(case.backward, skipped)
            for rank, end in enumerate(ends):
                off = (end.x[step - 1] - expected[rank]).abs().max().item()
                assert off < 1e-9, f"{case}: rank {rank}, step {step}: off by {off}"
        assert {end.rounds for end in ends} == {((steps - 3) // tau,) * 2}
        assert all(torch.equal(end.x[-1], ends[0].x[-1]) for end in ends)
        assert all(end.steps == steps and end.resumes > 0 for end in ends)
        total += ends[0].rounds[1]
    return total


def slope(rss: Sequence[int]) -> float:
    """Bytes a sample that the second half of a series grows by, by least squares."""
    late = torch.tensor(rss[len(rss) // 2 :], dtype=torch.float64)
    t = torch.arange(len(late), dtype=torch.float64)
    t = t - t.mean()
    return float((t * (late - late.mean())).sum() / (t * t).sum())


@pytest.mark.slow
def test_a_short_soak() -> None:
    assert check(steps=43, size=4, tau=2) == len(PERIODIC) * 20


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_thousands_of_rounds() -> None:
    assert check(steps=1003, size=4, tau=1) == len(PERIODIC) * 1000


def long_run(case: Case) -> list[int]:
    """Memory of one state that goes on and on, without what a test keeps."""
    run = Trainer(case)
    samples = []
    for step in range(case.steps):
        run.step()
        if step % 10 == 0:
            run.state.state_dict()
            with run.state.averaged():
                pass
        if step % (case.steps // 40) == 0:
            samples.append(resident())
    return samples


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("algorithm", PERIODIC)
def test_memory_stays_flat(algorithm: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Over the second half of 4,000 rounds: less than the smallest vector, lost once a round."""
    (*_, arguments) = with_tau(algorithm, 1)
    case = Case(algorithm, arguments, optimizers=plain_sgd, steps=4000)
    slopes = [slope(rss) / (case.steps / 40) for rss in run_ranks(long_run, 2, case, timeout=600.0)]
    with capsys.disabled():
        print(f"\n{case}: {max(slopes):.0f} bytes a round")
    assert max(slopes) < 100
