"""Pins what becomes of ranks when the link of one is cut: survived, or reported by name."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

from network import sandbox  # noqa: E402 (needs the path above)
from tests.harness import scaled  # noqa: E402

REFUSAL = sandbox.refusal()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REFUSAL is not None, reason=f"no network namespaces here: {REFUSAL}"),
]


def cut(folder: Path, seconds: float, timeout: float) -> list[dict[str, Any]]:
    """Each rank's report of a run whose link is down for ``seconds`` from a boundary on.

    ``timeout`` is the group's; both are longer on a busy machine.
    """
    script = Path(__file__).with_name("cut_link.py")
    times = [str(scaled(seconds)), str(scaled(timeout))]
    words = [sys.executable, str(script), str(folder), *times, "8"]
    done = subprocess.run(
        sandbox.command(*words),
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'recipes'}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=scaled(110),
        check=False,
    )
    printed = "".join(path.read_text() for path in sorted(folder.glob("output-*")))
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{printed}"
    reports = sorted(folder.glob("report-*.json"))
    assert len(reports) == 2, printed
    return [json.loads(path.read_text()) for path in reports]


@pytest.mark.parametrize(
    "seconds", [1.0, pytest.param(3.0, marks=pytest.mark.soak)], ids=lambda s: f"{s:.0f}s"
)
def test_a_short_cut_is_survived(seconds: float, tmp_path: Path) -> None:
    """TCP sends again what was lost; the run ends on one model as if nothing had been."""
    first, second = cut(tmp_path, seconds, timeout=60.0)
    assert (first["error"], second["error"]) == (None, None)
    assert first["x"] == second["x"]


def test_a_cut_beyond_the_timeout_is_reported(tmp_path: Path) -> None:
    for report in cut(tmp_path, 7.0, timeout=4.0):
        assert report["error"].startswith("OverlapLocalSGD: round ")
        assert "failed at step" in report["error"]
        assert "among ranks [0, 1]" in report["error"]
        assert report["intact"]
