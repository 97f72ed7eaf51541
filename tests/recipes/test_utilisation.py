"""The curve of utilisation against bandwidth. No time is asserted."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmark import utilisation
from benchmark.contenders import INT8
from benchmark.utilisation import DDP, Gap, Point, Points, Setting, gaps, table
from benchmark.utilisation_picture import draw_utilisation
from network.sandbox import refusal
from tests.harness import scaled

SCRIPT = Path(__file__).parents[2] / "recipes" / "utilisation.py"
SETTING = Setting(ranks=2, step_ms=45.0, size=0.15, repeats=1)
REFUSAL = refusal()


def point(contender: str, rate: str, tau: int | None, share: float) -> Point:
    return Point(SETTING, contender, rate, tau, 45.0, 45.0 / share, share, 4_000_000)


def test_what_is_known_is_no_gap() -> None:
    known = [point(DDP, "1gbit", None, 0.5), point(INT8, "1gbit", 8, 0.9)]
    left = list(gaps(["1gbit", "50mbit"], [1, 8], [DDP, INT8], known))
    # DDP has no tau, so that it is measured once a rate.
    assert left == [
        Gap("1gbit", 1, (INT8,)),
        Gap("50mbit", None, (DDP,)),
        Gap("50mbit", 1, (INT8,)),
        Gap("50mbit", 8, (INT8,)),
    ]


def test_points_are_kept_with_their_setting(tmp_path: Path) -> None:
    first = point(INT8, "1gbit", 8, 0.9)
    other = replace(first, setting=replace(SETTING, step_ms=10.0))
    Points(tmp_path / "points.json").add([first, other])
    again = Points(tmp_path / "points.json")
    assert again.of(SETTING) == [first]
    assert again.of(other.setting) == [other]


def test_another_machines_points_are_no_part_of_the_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Points(tmp_path / "points.json").add([point(DDP, "1gbit", None, 0.5)])
    monkeypatch.setattr(utilisation, "machine", lambda: "a faster one")
    with pytest.raises(ValueError, match="measurements of another machine"):
        Points(tmp_path / "points.json")


def test_the_table_leaves_open_what_is_not_measured() -> None:
    points = [point(INT8, "1gbit", 8, 0.98765), point(DDP, "50mbit", None, 0.04)]
    rows = table(points, ["1gbit", "50mbit"], [8], {"1gbit": "1000", "50mbit": "50"}).splitlines()
    assert rows[0] == "|  | tau | 1000 | 50 |"
    assert rows[2:] == ["| DDP | - |  | 4.0 |", f"| {INT8} | 8 | 98.8 |  |"]


def test_the_picture_has_a_panel_for_every_tau(tmp_path: Path) -> None:
    rates = {"12.5mbit": 12.5, "1gbit": 1000.0}
    points = [point(DDP, rate, None, 0.1) for rate in rates]
    points += [point(INT8, rate, tau, 0.9) for rate in rates for tau in (1, 8)]
    draw_utilisation(points, rates, [1, 8], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--output-dir", str(folder), *options],
        capture_output=True,
        text=True,
        timeout=scaled(110),
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(REFUSAL is not None, reason=f"no shaped network here: {REFUSAL}")
def test_a_run_goes_on_where_it_ended(tmp_path: Path) -> None:
    options = ("--quick", "--rates", "1gbit", "--docs", str(tmp_path / "docs"))
    first = run(tmp_path, *options, "--tau", "2")
    assert first.returncode == 0, first.stdout + first.stderr
    points = json.loads((tmp_path / "points.json").read_text())["points"]
    assert {p["contender"] for p in points} >= {DDP, "commhooks OverlapLocalSGD", INT8}
    assert all(p["utilisation"] > 0 for p in points)
    second = run(tmp_path, *options, "--tau", "2")
    assert second.returncode == 0, second.stdout + second.stderr
    # Measured anew, it would hardly be the same to the last digit.
    assert json.loads((tmp_path / "docs" / "points.json").read_text())["points"] == points
    assert "1gbit, tau=2" not in second.stdout
    assert (tmp_path / "docs" / "utilisation.png").stat().st_size > 10_000


def test_a_rate_that_has_no_place_on_the_curve_is_refused(tmp_path: Path) -> None:
    if REFUSAL is not None:
        pytest.skip(f"no shaped network here: {REFUSAL}")
    done = run(tmp_path, "--rates", "unshaped")
    assert done.returncode == 2
    assert "'unshaped' is no rate to draw a point at" in done.stdout
