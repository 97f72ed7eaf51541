"""The images the recipes train on, and the loader that feeds one worker its own share of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import RecipeError
from common.partitions import Indices
from common.torchvision_cpu import torchvision

__all__ = [
    "DatasetName",
    "Images",
    "ShareOrder",
    "load_images",
    "share_loader",
    "test_loader",
]

DatasetName = Literal["digits", "cifar10"]
Sample = tuple[Tensor, int]
T = TypeVar("T")
# A sample's place in the share, and the seed of what is random about reading it.
Key = tuple[int, int]

# Mean and standard deviation of the training pixels, scaled to [0, 1].
_DIGITS_NORM = ((0.305,), (0.376,))
_CIFAR10_NORM = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@dataclass(frozen=True)
class Images:
    """A labelled set of images, split into training and test set.

    ``train`` augments: the same index gives a different crop every time. ``labels`` are those of
    ``train``, for the partition.
    """

    train: Dataset[Sample]
    test: Dataset[Sample]
    labels: Indices
    channels: int
    classes: int


def load_images(name: DatasetName, data_dir: Path | None = None) -> Images:
    """Load a data set by name; only CIFAR-10 is looked for in ``data_dir``.

    Raises:
        RecipeError: CIFAR-10 without a ``data_dir``, or its files there are missing or damaged.
    """
    if name == "digits":
        return _digits()
    if data_dir is None:
        raise RecipeError("cifar10 needs --data-dir: the folder that holds cifar-10-batches-py")
    return _cifar10(data_dir)


class ShareOrder(Sampler[Key]):
    """The order in which a worker goes through its share, a new one every epoch.

    It depends on nothing but the seed and the epoch, so that a run can go on anywhere.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        self._epoch = 0
        self._skipped = 0

    def start_at(self, epoch: int, samples: int) -> None:
        """Let the next pass be number ``epoch``, from 0, without its first ``samples``."""
        self._epoch, self._skipped = epoch, samples

    def __iter__(self) -> Iterator[Key]:
        random = np.random.default_rng((self._seed, self._epoch))
        places = random.permutation(self._size).tolist()
        seeds = random.integers(2**62, size=self._size).tolist()
        skipped, self._skipped = self._skipped, 0
        self._epoch += 1
        yield from list(zip(places, seeds, strict=True))[skipped:]

    def __len__(self) -> int:
        return self._size


class _Share(Dataset[T], Generic[T]):
    """A worker's samples, augmented the same way whenever one is read with the same seed."""

    def __init__(self, dataset: Dataset[T], share: Indices) -> None:
        self._dataset = dataset
        self._share = share.tolist()

    def __len__(self) -> int:
        return len(self._share)

    def __getitem__(self, key: Key) -> T:
        place, seed = key
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            return self._dataset[self._share[place]]


def share_loader(
    dataset: Dataset[T],
    share: Indices,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    workers: int = 0,
    order: ShareOrder | None = None,
) -> DataLoader[T]:
    """Batches of one worker's own share, in a new order every epoch.

    The incomplete last batch is left out: every rank then takes the same number of steps, and
    BatchNorm never meets a batch of one. With an ``order`` of one's own one decides where a pass
    starts.

    Raises:
        RecipeError: the share does not fill one batch.
    """
    if len(share) < batch_size:
        raise RecipeError(
            f"a worker's share of {len(share)} samples does not fill a batch of {batch_size}: "
            "use a smaller --batch-size or fewer processes"
        )
    loader = DataLoader(
        _Share(dataset, share),
        batch_size=batch_size,
        sampler=order or ShareOrder(len(share), seed),
        drop_last=True,
        # Loading draws no number from the global generator.
        generator=torch.Generator().manual_seed(seed),
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    # Accelerator.prepare would split the batches over the processes once more. For one process of
    # one it leaves them alone, and still moves them to the device and tells accumulate() where the
    # epoch ends.
    prepared: DataLoader[T] = prepare_data_loader(
        loader, device=device, num_processes=1, process_index=0, put_on_device=True
    )
    return prepared


def test_loader(dataset: Dataset[T], batch_size: int = 256) -> DataLoader[T]:
    """The test set in order; ``Accelerator.prepare`` spreads it over the processes."""
    return DataLoader(dataset, batch_size=batch_size)


class _ArrayImages(Dataset[Sample]):
    """Images held in memory, transformed as they are read."""

    def __init__(
        self, images: Tensor, labels: Indices, transform: Callable[[Tensor], Tensor]
    ) -> None:
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.transform(self.images[index]), int(self.labels[index])


def _digits() -> Images:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, a fifth of them for the test."""
    digits: Any = load_digits()
    # The split never depends on the run's seed: all runs are tested on the same 360 images.
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=360, random_state=0, stratify=digits.target
    )
    pixels = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = digits.target.astype(np.int64)
    transforms = torchvision.transforms
    normalise = transforms.Normalize(*_DIGITS_NORM)
    # Flips would turn digits into other signs; a shift by a pixel leaves them what they are.
    shift = transforms.Compose([transforms.RandomCrop(8, padding=1), normalise])
    return Images(
        train=_ArrayImages(pixels[train], labels[train], shift),
        test=_ArrayImages(pixels[test], labels[test], normalise),
        labels=labels[train],
        channels=1,
        classes=10,
    )


def _cifar10(data_dir: Path) -> Images:
    transforms = torchvision.transforms
    finish = [transforms.ToTensor(), transforms.Normalize(*_CIFAR10_NORM)]
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    try:
        train = torchvision.datasets.CIFAR10(
            data_dir, train=True, transform=transforms.Compose([*augment, *finish])
        )
        test = torchvision.datasets.CIFAR10(
            data_dir, train=False, transform=transforms.Compose(finish)
        )
    except RuntimeError as error:
        raise RecipeError(
            f"no intact CIFAR-10 in {data_dir}: it should hold the folder cifar-10-batches-py "
            "from cifar-10-python.tar.gz, the Python version of the data set"
        ) from error
    labels = np.array(train.targets, dtype=np.int64)
    return Images(train=train, test=test, labels=labels, channels=3, classes=len(train.classes))
