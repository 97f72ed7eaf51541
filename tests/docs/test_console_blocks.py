"""Pins that what README and docs show ``commhooks.plan`` printing is what it prints."""

import re
import shlex
from pathlib import Path

import pytest

from commhooks import plan

ROOT = Path(__file__).parents[2]
COMMAND = "$ python -m commhooks.plan "
# The command goes on in the next line after a backslash.
BLOCK = re.compile(
    rf"^```console\n{re.escape(COMMAND)}((?:.*\\\n)*.*)\n((?s:.*?))^```$", re.MULTILINE
)
SHOWN = [
    pytest.param(*found.groups(), id=str(page.relative_to(ROOT)))
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "_build" not in page.parts
    for found in BLOCK.finditer(page.read_text())
]


def test_there_is_something_to_check() -> None:
    assert SHOWN


@pytest.mark.parametrize(("arguments", "output"), SHOWN)
def test_output_is_what_is_printed(
    arguments: str, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan.main(shlex.split(arguments.replace("\\\n", "")))
    assert capsys.readouterr().out == output
