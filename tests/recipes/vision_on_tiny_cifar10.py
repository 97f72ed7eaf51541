"""recipes/vision.py, with a torchvision that takes the tests' tiny CIFAR-10 for the real one."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT)]

from common.torchvision_cpu import torchvision  # noqa: E402 (needs the path above)
from tests.recipes.cifar10_files import accept_checksums  # noqa: E402

data_dir = Path(sys.argv[sys.argv.index("--data-dir") + 1])
for name, value in accept_checksums(data_dir).items():
    setattr(torchvision.datasets.CIFAR10, name, value)
runpy.run_path(str(ROOT / "recipes" / "vision.py"), run_name="__main__")
