"""The models, for the sizes of image they are meant for."""

import pytest
import torch
from torch import nn

from common.models import ModelName, build_model
from common.traffic import gradient_bytes, ring_bytes


@pytest.mark.parametrize("name", ["resnet18", "small-cnn"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_models_take_digits_and_cifar10(name: ModelName, channels: int, size: int) -> None:
    logits = build_model(name, channels, 10)(torch.zeros(2, channels, size, size))
    assert logits.shape == (2, 10)


def test_resnet18_is_in_its_cifar_form() -> None:
    model = build_model("resnet18", channels=3, classes=10)
    stem = model.get_submodule("conv1")
    assert isinstance(stem, nn.Conv2d)
    assert (stem.kernel_size, stem.stride) == ((3, 3), (1, 1))
    assert isinstance(model.get_submodule("maxpool"), nn.Identity)
    # He et al.'s 11.2 million, with ten classes.
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962


def test_bytes_sent_by_plain_ddp() -> None:
    model = build_model("small-cnn", channels=1, classes=10)
    assert gradient_bytes(model) == 4 * sum(p.numel() for p in model.parameters())
    assert [ring_bytes(100, workers) for workers in (1, 2, 4)] == [0, 100, 150]
