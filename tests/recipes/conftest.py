"""What the tests of the recipes share: the recipes' own import root, and one small run."""

import fcntl
import os
import pickle
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
    """Two epochs of Overlap-Local-SGD on two processes, with an offline W&B run.

    Through the launcher, and once for all workers of pytest-xdist.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "overlap"
    folder.mkdir(exist_ok=True)
    kept = folder / "run.pickle"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second waits
        if not kept.exists():
            arguments = [*OVERLAP, "--wandb", "offline", "--log-every", "1", "--tags", "extra"]
            run = train(folder, "overlap-local-sgd", *arguments, launcher=True)
            kept.write_bytes(pickle.dumps(run))
    found: Run = pickle.loads(kept.read_bytes())
    return found
