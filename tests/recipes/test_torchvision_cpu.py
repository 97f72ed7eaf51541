"""The import of torchvision beside a CPU build of torch, in fresh interpreters."""

import os
import subprocess
import sys

from common.launch import RECIPES
from tests.harness import scaled


def fails_alone() -> bool:
    """Whether torchvision cannot be imported as it is, the way the module knows."""
    alone = _python("import torchvision")
    return alone.returncode != 0 and "operator torchvision::nms does not exist" in alone.stderr


def test_torchvision_works_through_the_module() -> None:
    done = _python(
        "from common.torchvision_cpu import torchvision as tv, _declarations\n"
        "tv.models.resnet18; tv.datasets.CIFAR10; tv.transforms.RandomCrop\n"
        "import torchvision; assert torchvision is tv\n"
        "print(len(_declarations))"
    )
    assert done.returncode == 0, done.stderr
    # Nothing is declared where nothing is missing.
    assert int(done.stdout) == fails_alone()


def test_other_failures_are_not_hidden() -> None:
    done = _python(
        "import sys, types\n"
        "class Broken:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torchvision': raise RuntimeError('out of disk')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "import common.torchvision_cpu"
    )
    assert done.returncode != 0
    assert "RuntimeError: out of disk" in done.stderr


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(RECIPES)},
        capture_output=True,
        text=True,
        timeout=scaled(60),
        check=False,
    )
