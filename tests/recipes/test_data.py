"""The data sets, and the loader that feeds one worker its share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor

from common.data import Images, load_images, share_loader
from common.errors import RecipeError
from common.torchvision_cpu import torchvision
from tests.recipes.cifar10_files import accept_checksums, write_cifar10

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Images:
    return load_images("digits")


@pytest.fixture(autouse=True)
def no_accelerate_state() -> None:
    """Accelerate's loaders look at process-wide state, which other tests may have left."""
    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()


def stacked(images: Images, indices: range) -> tuple[Tensor, Tensor]:
    samples = [images.test[index] for index in indices]
    return torch.stack([image for image, _ in samples]), torch.tensor([y for _, y in samples])


def test_digits_are_normalised_and_split(digits: Images) -> None:
    assert len(digits.labels) == 1437
    images, labels = stacked(digits, range(360))
    assert images.shape == (360, 1, 8, 8)
    assert abs(images.mean().item()) < 0.05
    assert abs(images.std().item() - 1) < 0.05
    # Stratified: a tenth of each kind, give or take one.
    assert torch.bincount(labels).tolist() == pytest.approx([36] * 10, abs=2)


def test_training_images_are_shifted_and_test_images_are_not(digits: Images) -> None:
    torch.manual_seed(0)
    assert len({tuple(digits.train[0][0].flatten().tolist()) for _ in range(50)}) > 5
    assert torch.equal(digits.test[0][0], digits.test[0][0])


def test_train_labels_are_those_of_the_partition(digits: Images) -> None:
    assert [digits.train[index][1] for index in range(50)] == digits.labels[:50].tolist()


def batches(images: Images, seed: int, epochs: int = 1) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(7)
    share = np.arange(100)
    loader = share_loader(images.train, share, batch_size=32, seed=seed, device=CPU)
    return [(x, y) for _ in range(epochs) for x, y in loader]


def test_the_same_seed_gives_the_same_batches(digits: Images) -> None:
    first, again, other = (batches(digits, seed) for seed in (1, 1, 2))
    for (x, y), (x_again, y_again) in zip(first, again, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
    assert not torch.equal(first[0][0], other[0][0])


def test_epochs_have_different_orders_and_only_full_batches(digits: Images) -> None:
    two_epochs = batches(digits, seed=0, epochs=2)
    assert [len(y) for _, y in two_epochs] == [32] * 6
    assert not torch.equal(two_epochs[0][1], two_epochs[3][1])


def test_a_loader_draws_from_its_share_alone(digits: Images) -> None:
    """Accelerate must not spread a share over the processes once more."""
    share = np.flatnonzero(digits.labels == 3)
    loader = share_loader(digits.train, share, batch_size=16, seed=0, device=CPU)
    labels = torch.cat([y for _, y in loader])
    assert len(labels) == len(share) // 16 * 16
    assert (labels == 3).all()


def test_a_share_smaller_than_a_batch_is_refused(digits: Images) -> None:
    with pytest.raises(RecipeError, match="share of 10 samples does not fill a batch of 32"):
        share_loader(digits.train, np.arange(10), batch_size=32, seed=0, device=CPU)


def test_cifar10_is_read_from_its_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(tmp_path, per_batch=20)
    for name, value in accept_checksums(tmp_path).items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
    images = load_images("cifar10", tmp_path)
    assert (images.channels, images.classes) == (3, 10)
    assert images.labels.tolist() == list(range(10)) * 10
    test_images, test_labels = stacked(images, range(20))
    assert test_images.shape == (20, 3, 32, 32)
    assert test_labels.tolist() == list(range(10)) * 2
    # Random bytes have mean 0.5 and standard deviation 0.29, which these make of them.
    assert test_images.mean().item() == pytest.approx((0.5 - 0.4734) / 0.2515, abs=0.05)
    assert test_images.std().item() == pytest.approx(0.289 / 0.2515, abs=0.05)
    torch.manual_seed(0)
    crops = {tuple(images.train[0][0].flatten().tolist()) for _ in range(10)}
    assert len(crops) > 5


@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_a_damaged_cifar10_is_refused(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(tmp_path)
    for name, value in accept_checksums(tmp_path).items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    if damage == "missing":
        batch.unlink()
    else:
        batch.write_bytes(batch.read_bytes() + b"x")
    with pytest.raises(RecipeError, match="no intact CIFAR-10"):
        load_images("cifar10", tmp_path)


def test_cifar10_needs_a_folder() -> None:
    with pytest.raises(RecipeError, match="--data-dir"):
        load_images("cifar10")
