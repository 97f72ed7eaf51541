"""What the fork server imports for the recipes: all that takes long, and their own modules."""

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import wandb  # noqa: F401

import common.torchvision_cpu  # noqa: F401 (needs the path above)
import compare  # noqa: F401
import language  # noqa: F401
import vision  # noqa: F401

del sys.path[0]
# As in tests.harness.preloaded.
gc.collect()
gc.freeze()
