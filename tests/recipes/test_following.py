"""The recipe that shows how tau follows a link."""

import sys
from pathlib import Path

import pytest

import following
from benchmark.following import StepRecord
from following import Following
from network import sandbox


def records(*course: tuple[float, int, int, float]) -> list[StepRecord]:
    """From (seconds, tau, rounds, exposed) of some steps."""
    return [
        StepRecord(seconds, step, tau, rounds, exposed, 0.1, 0.01)
        for step, (seconds, tau, rounds, exposed) in enumerate(course, 1)
    ]


def test_a_stretch_is_told_by_where_it_ends() -> None:
    plan = Following(rate="200mbit,50mbit@10", seconds=20)
    course = records(
        *((1.0, 8, 1, 0.0), (5.0, 9, 2, 0.1), (9.0, 9, 3, 0.1)),
        *((10.0, 9, 4, 0.2), (12.0, 9, 5, 0.8), (14.0, 30, 6, 1.0), (19.0, 30, 7, 1.1)),
    )
    assert following.rows(plan, "auto", course) == [
        ["auto", "200mbit", "9", "0", "1.2%"],
        ["auto", "50mbit", "30", "2", "10.0%"],
        ["auto", "all of it", "", "", "6.1%"],
    ]


@pytest.mark.skipif(sandbox.refusal() is not None, reason="links cannot be shaped here")
def test_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--rate", "400mbit,100mbit@12", "--seconds", "20", "--step-ms", "5", "--size", "0.05"]
    folders = ["--output-dir", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")]
    monkeypatch.setattr(sys, "argv", ["following.py", *words, *folders])
    assert following.main() == 0
    table = (tmp_path / "docs" / "tables.inc").read_text()
    assert table.count("| auto |") == 3
    assert table.count("| fixed | 100mbit | 8 |") == 1
    assert (tmp_path / "docs" / "following.png").read_bytes().startswith(b"\x89PNG")
