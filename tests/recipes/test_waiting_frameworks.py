"""Pins that the frameworks' table is printed, and that without what they send nothing is sent.

No time is asserted.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.harness import scaled

SCRIPT = Path(__file__).parents[2] / "recipes" / "waiting_frameworks.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not find_spec("lightning") or not find_spec("transformers"),
        reason="needs the extra frameworks",
    ),
]


def test_quick_form_measures_every_framework(tmp_path: Path) -> None:
    options = ["--quick", "--output-dir", str(tmp_path), "--docs", str(tmp_path / "docs")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        capture_output=True,
        text=True,
        timeout=scaled(110),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "docs" / "frameworks.json").read_text())["frameworks"]
    assert [each["framework"] for each in found] == ["Lightning", "Trainer", "Accelerate"]
    for each in found:
        assert each["as it is"]["sent"] >= 20
        assert each["without"]["sent"] <= 2
    assert "| Trainer: " in (tmp_path / "docs" / "tables.inc").read_text()
