"""Waiting for a slow worker: what is measured, and what is made of it. No time is asserted."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmark.contenders import BASELINE
from benchmark.slow_worker import CASES, Case, SlowWorker, pauses_at
from benchmark.waiting import Waiting, draw_waiting, waiting_of, waiting_table
from tests.harness import scaled

SCRIPT = Path(__file__).parents[2] / "recipes" / "slow_worker.py"


def plan(case: Case) -> SlowWorker:
    return SlowWorker(
        case=case,
        step_seconds=0.03,
        size=0.1,
        tau=16,
        warmup=80,
        steps=160,
        pause_every=10,
        pause_steps=3,
        only=(),
    )


def pauses(case: Case, rank: int, steps: int = 80) -> list[int]:
    return [step for step in range(steps) if pauses_at(plan(case), step, rank, ranks=4)]


def test_who_pauses_when() -> None:
    assert [pauses("slower", rank) for rank in range(4)] == [[], [], [], []]
    assert [len(pauses("stopped", rank)) for rank in range(4)] == [0, 0, 0, 8]
    # Nobody is behind the others for good.
    assert [pauses("in-turn", rank) for rank in range(4)] == [
        [5, 45],
        [15, 55],
        [25, 65],
        [35, 75],
    ]


def record(contender: str, seconds: list[float], case: Case = "slower") -> dict[str, Any]:
    return {
        "case": case,
        "contender": contender,
        "kind": "step",
        "steps": 10,
        "seconds": seconds,
    }


def test_waiting_is_what_the_others_take_above_their_own_time() -> None:
    # One turn of no communication was disturbed.
    turns = ([1.0, 1.0, 2.0], [1.0, 5.0, 2.0], [1.0, 1.0, 2.0])
    alone = [record(BASELINE, seconds) for seconds in turns]
    (ddp,) = waiting_of([*alone, record("DDP", [2.0, 2.0, 2.0])])
    assert ddp == Waiting("slower", "DDP", per_step=0.1, share=0.5)


def test_all_wait_where_each_is_slow_in_turn() -> None:
    alone = record(BASELINE, [1.0, 1.0], "in-turn")
    (ddp,) = waiting_of([alone, record("DDP", [1.5, 1.0], "in-turn")])
    assert (ddp.per_step, ddp.share) == (0.025, 0.2)


def test_table_and_picture_have_every_case(tmp_path: Path) -> None:
    found = [Waiting(case, "DDP", 0.03, 0.5) for case in CASES]
    found.append(Waiting("in-turn", "commhooks EASGD", 0.0, 0.0))
    head, _, ddp, easgd = waiting_table(found).splitlines()
    assert "each stops in turn: ms a step" in head
    assert ddp == "| DDP | 30.0 | 50.0 | 30.0 | 50.0 | 30.0 | 50.0 |"
    assert easgd == "| commhooks EASGD |  |  |  |  | 0.0 | 0.0 |"
    draw_waiting(found, tmp_path / "waiting.png")
    assert (tmp_path / "waiting.png").stat().st_size > 10_000


@pytest.mark.slow
def test_quick_form_measures_every_algorithm(tmp_path: Path) -> None:
    options = ["--quick", "--output-dir", str(tmp_path), "--docs", str(tmp_path / "docs")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        capture_output=True,
        text=True,
        timeout=scaled(110),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    waiting = json.loads((tmp_path / "docs" / "waiting.json").read_text())["waiting"]
    assert len(waiting) == len(CASES) * 8
    assert {each["case"] for each in waiting} == set(CASES)
    assert all(0 <= each["share"] < 1 for each in waiting)
    assert "| DDP |" in (tmp_path / "docs" / "tables.inc").read_text()
