"""Pins that a recipe names its own option where DDP's learning rate is not the algorithm's."""

from pathlib import Path

import pytest

from common.launch import RECIPES
from tests.harness.script import run_script
from tests.recipes.runs import TIMEOUT

SMALL = ("--layers", "1", "--width", "16", "--heads", "2", "--context", "16", "--batch-size", "8")
FIT = (*SMALL, "--eval-every", "4", "--lr", "0.002")
VISION = ("--model", "small-cnn")


def printed(recipe: str, folder: Path, *arguments: str) -> str:
    words = ["--max-steps", "4", "--wandb", "disabled", "--output-dir", str(folder), *arguments]
    return run_script(RECIPES / f"{recipe}.py", words, 2, folder=folder, timeout=TIMEOUT)


@pytest.mark.parametrize(
    ("recipe", "arguments", "cure"),
    [
        ("vision", VISION, "If --lr 0.05 is that rate, add --scale-lr."),
        pytest.param(
            "trainer",
            FIT,
            "If --lr 0.002 is that rate, give --lr 0.005.",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "lightning_fit",
            FIT,
            "If --lr 0.002 is that rate, give --lr 0.005.",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_cure_is_an_option(
    recipe: str, arguments: tuple[str, ...], cure: str, tmp_path: Path
) -> None:
    text = printed(recipe, tmp_path, "--algorithm", "overlap-local-sgd", *arguments)
    assert text.count(f"2.5 times the learning rate that is right for DDP. {cure}\n") == 1
    assert "commhooks:" not in text


@pytest.mark.parametrize("given", [("--scale-lr",), ("--algorithm", "local-sgd")])
def test_nothing_is_said_of_a_rate_that_is_right(given: tuple[str, ...], tmp_path: Path) -> None:
    assert "learning rate" not in printed("vision", tmp_path, *VISION, *given)
