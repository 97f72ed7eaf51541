"""Pins that the Python of README and docs runs, block after block of a page in one namespace.

Fences of ``python`` are run; ``py`` marks a fragment of somebody's larger program.
"""

import re
from pathlib import Path

import pytest

from tests.harness import run_ranks

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if "_build" not in page.parts and BLOCK.search(page.read_text())
)


def run_page(name: str) -> int:
    blocks = BLOCK.findall((ROOT / name).read_text())
    namespace: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{name}, block {number}", "exec"), namespace)
    return len(blocks)


def test_there_are_pages_to_run() -> None:
    assert "docs/start.md" in PAGES


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page: str) -> None:
    # Not tidy: the classes and functions of a page keep its model, and so its group, for a while.
    assert all(blocks > 0 for blocks in run_ranks(run_page, 2, page, tidy=False))
