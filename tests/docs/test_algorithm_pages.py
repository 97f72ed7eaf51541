"""Pins the pages of the algorithms to the code: arguments, defaults, memory."""

import inspect
import re
from pathlib import Path

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
        if argument.kind is not argument.VAR_KEYWORD
    }
    assert documented.keys() == arguments.keys()
    for argument, default in arguments.items():
        if default is inspect.Parameter.empty:
            assert documented[argument] == "none, must be given"
        else:
            assert documented[argument].replace("`", "").startswith(str(default)), argument


@pytest.mark.parametrize("name", ALGORITHMS)
def test_memory_and_kind_of_rounds(name: str) -> None:
    page, states = (FOLDER / f"{name}.md").read_text(), ALGORITHMS[name]
    (memory,) = re.findall(r"^\| memory \| (.*) \|$", page, re.MULTILINE)
    numbers = {int(number) for number in re.findall(r"(?<!=)\b\d\b", memory)}
    assert numbers == {1 + len(state.vectors) for state in states}
    kind = "overlapped" if states[0].overlapped else "blocking"
    assert f"| rounds | {kind}: " in page
