"""What a rank needs before it imports transformers or lightning."""

import importlib
import sys
from pathlib import Path

from tests.accelerated import rank_environment

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def ready_for_frameworks() -> None:
    """Say which rank this is, and let torchvision, which both import, work beside a CPU torch."""
    rank_environment()
    if str(RECIPES) not in sys.path:
        sys.path.append(str(RECIPES))
    importlib.import_module("common.torchvision_cpu")
