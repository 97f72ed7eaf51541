"""Pins the pages of the algorithms to the code: arguments, defaults, memory."""

import inspect
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import commhooks
from commhooks import CommHookState

FOLDER = Path(__file__).parents[2] / "docs" / "algorithms"
ALGORITHMS: dict[str, list[CommHookState]] = {
    "local-sgd": [commhooks.LocalSGD(1)],
    "overlap-local-sgd": [commhooks.OverlapLocalSGD(1), commhooks.OverlapLocalSGD(1, beta=0.5)],
    "easgd": [commhooks.EASGD(1)],
    "cocod-sgd": [commhooks.CoCoDSGD(1)],
    "bmuf": [commhooks.BMUF(1)],
    "slowmo": [commhooks.SlowMo(1)],
    "diloco": [commhooks.DiLoCo(1), commhooks.DiLoCo(1, merge="carry")],
}
ROW = re.compile(r"^\| `(\w+)` \| ([^|]*) \|", re.MULTILINE)


def test_every_algorithm_has_a_page() -> None:
    states = {
        name
        for name, value in vars(commhooks).items()
        if isinstance(value, type) and issubclass(value, CommHookState)
    }
    pages = [page.read_text() for page in FOLDER.glob("*.md")]
    for name in states - {"CommHookState"}:
        assert any(f"{{py:class}}`commhooks.{name}`" in page for page in pages), name


@pytest.mark.parametrize("name", ALGORITHMS)
def test_arguments_and_defaults(name: str) -> None:
    page, state = (FOLDER / f"{name}.md").read_text(), ALGORITHMS[name][0]
    documented = dict(ROW.findall(page))
    arguments = {
        argument.name: argument.default
        for argument in inspect.signature(type(state)).parameters.values()
        # What all of them take is documented once.
        if argument.kind is not argument.KEYWORD_ONLY
    }
    assert documented.keys() == arguments.keys()
    for argument, default in arguments.items():
        if default is inspect.Parameter.empty:
            assert documented[argument] == "none, must be given"
        else:
            assert documented[argument].replace("`", "").startswith(written(default)), argument


def written(default: Any) -> str:
    if isinstance(default, partial):
        arguments = ", ".join(f"{name}={value}" for name, value in default.keywords.items())
        return f"partial({default.func.__name__}, {arguments})"
    return f'"{default}"' if isinstance(default, str) else str(default)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_memory_and_kind_of_rounds(name: str) -> None:
    page, states = (FOLDER / f"{name}.md").read_text(), ALGORITHMS[name]
    (memory,) = re.findall(r"^\| memory \| (.*) \|$", page, re.MULTILINE)
    numbers = {int(number) for number in re.findall(r"(?<!=)\b\d\b", memory)}
    # The wire, the vectors, and the momentum of DiLoCo's default.
    outer = isinstance(states[0], commhooks.DiLoCo)
    assert numbers == {1 + len(state.vectors) + outer for state in states}
    kind = "overlapped" if states[0].delay else "blocking"
    assert f"| rounds | {kind}: " in page
