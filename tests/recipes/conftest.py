"""What the tests of the recipes share: the recipes' own import root, and one small run."""

import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
# Recipes are scripts: they import their neighbours from the folder they lie in.
sys.path.insert(0, str(RECIPES))

from tests.harness import preload  # noqa: E402 (needs the path above)
from tests.recipes.runs import OVERLAP, Run, train  # noqa: E402

preload("tests.recipes.preloaded")


@pytest.fixture(scope="session")
def overlap_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs of Overlap-Local-SGD on two processes, with an offline W&B run."""
    folder = tmp_path_factory.mktemp("overlap")
    arguments = [*OVERLAP, "--wandb", "offline", "--log-every", "1", "--tags", "extra"]
    return train(folder, "overlap-local-sgd", *arguments, launcher=True)
