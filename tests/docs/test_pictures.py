"""Pins that ``make pictures`` makes the pictures that the documentation shows."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from tests.harness import scaled

DOCS = Path(__file__).parents[2] / "docs"


def test_pictures_are_drawn(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pictures", str(tmp_path)], cwd=DOCS, check=True, timeout=scaled(60)
    )
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (DOCS / "pictures").glob("*.svg")}
    for name in drawn:
        sizes = [
            ElementTree.parse(f / name).getroot().get("viewBox")
            for f in (tmp_path, DOCS / "pictures")
        ]
        assert sizes[0] == sizes[1]
        assert any(f"pictures/{name}" in page.read_text() for page in DOCS.glob("*.md"))
