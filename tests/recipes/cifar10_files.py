"""A tiny CIFAR-10 in the on-disk format of cifar-10-python.tar.gz, once unpacked."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from common.torchvision_cpu import torchvision

CLASSES = [
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]


def write_cifar10(data_dir: Path, per_batch: int = 20) -> None:
    """Five training batches and a test batch of ``per_batch`` random images, and the labels' names.

    An image is 3,072 bytes: the red, then the green, then the blue plane, each row by row.
    """
    folder = data_dir / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        content = {
            "batch_label": name,
            "labels": [int(label) for label in np.arange(per_batch) % 10],
            "data": rng.integers(0, 256, size=(per_batch, 3072), dtype=np.uint8),
            "filenames": [f"{name}_{number}.png" for number in range(per_batch)],
        }
        _dump(content, folder / name)
    meta = {"num_cases_per_batch": per_batch, "label_names": CLASSES, "num_vis": 3072}
    _dump(meta, folder / "batches.meta")


def accept_checksums(data_dir: Path) -> dict[str, Any]:
    """torchvision's own lists of files, with the checksums of the files in ``data_dir``.

    torchvision takes no other CIFAR-10 than the real one, by its MD5 sums. To set on
    ``torchvision.datasets.CIFAR10``, in tests alone.
    """
    folder = data_dir / "cifar-10-batches-py"
    original = torchvision.datasets.CIFAR10
    return {
        "train_list": [[name, _md5(folder / name)] for name, _ in original.train_list],
        "test_list": [[name, _md5(folder / name)] for name, _ in original.test_list],
        "meta": {**original.meta, "md5": _md5(folder / original.meta["filename"])},
    }


def _dump(content: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        pickle.dump(content, file)


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()
