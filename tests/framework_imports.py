"""What the fork server imports for tests of transformers and lightning, where there are such."""

import gc
import importlib
import sys
from contextlib import suppress

from tests.frameworks import RECIPES

sys.path.append(str(RECIPES))
# Both import torchvision, which beside a CPU build of torch takes some help.
importlib.import_module("common.torchvision_cpu")
for module in ("commhooks.transformers", "commhooks.lightning"):
    with suppress(ImportError):
        importlib.import_module(module)
del sys.path[-1]
# As in tests.harness.preloaded.
gc.collect()
gc.freeze()
