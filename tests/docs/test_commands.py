"""Pins that the shell commands of README and docs are ones that exist, with options they take."""

import importlib
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import tyro

from commhooks import plan

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
# What make hands on, and whose options it is.
FLAGS = {"BENCHFLAGS": ("bench", "Bench"), "COMPAREFLAGS": ("compare", "Compare")}
COMMANDS = {"make", "accelerate", "python", "pip", "torchrun", "wandb"}


def commands() -> Iterator[tuple[str, str]]:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        if "_build" in page.parts:
            continue
        for block in FENCE.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                first, *_ = line.split() or [""]
                if Path(first).name in COMMANDS:
                    yield str(page.relative_to(ROOT)), line


ALL = sorted(set(commands()))


def test_there_are_commands_of_every_kind() -> None:
    starts = {Path(line.split()[0]).name for _, line in ALL}
    assert starts >= {"make", "accelerate", "python"}


@pytest.fixture(autouse=True)
def recipes_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))


@pytest.mark.parametrize(("page", "line"), ALL)
def test_a_command_is_accepted(page: str, line: str) -> None:
    name, *words = shlex.split(line, comments=True)
    name = Path(name).name
    if name == "make":
        _check_make(words)
    elif "commhooks.plan" in words:
        _check_planner(words[words.index("commhooks.plan") + 1 :])
    elif script := next((word for word in words if word.startswith("recipes/")), None):
        assert (ROOT / script).is_file()
        if "accelerate" in (name, *words) or "recipes/start.py" in words:
            script = next(word for word in reversed(words) if word.startswith("recipes/"))
            _check_recipe(Path(script).stem, words[words.index(script) + 1 :])


def _check_planner(options: Sequence[str]) -> None:
    if "--measure" not in options:
        plan.main(options)
        return
    # All that is wrong is that nothing has launched it; options that it does not take end with 2.
    assert "RANK" not in os.environ
    with pytest.raises(SystemExit) as end:
        plan.main(options)
    assert end.value.code == 1


def _check_make(words: Sequence[str]) -> None:
    target, *variables = words
    assert target in TARGETS
    for variable in variables:
        key, _, value = variable.partition("=")
        assert f"$({key})" in (ROOT / "Makefile").read_text()
        if key in FLAGS:
            module, config = FLAGS[key]
            own = shlex.split(value)
            tyro.cli(
                getattr(importlib.import_module(module), config),
                args=own[: own.index("--")] if "--" in own else own,
            )


def _check_recipe(name: str, options: Sequence[str]) -> None:
    from common.options import read_command_line

    module = importlib.import_module(name)
    try:
        read_command_line(module.Config, "", options)
    except SystemExit:
        pytest.fail(f"{name} refuses {options}: {sys.exc_info()[1]}")
