"""The models of the recipes."""

from typing import Literal

from torch import nn

from common.torchvision_cpu import torchvision

__all__ = ["ModelName", "build_model"]

ModelName = Literal["resnet18", "small-cnn"]


def build_model(name: ModelName, channels: int, classes: int) -> nn.Module:
    """An image classifier: (batch, channels, height, width) to (batch, classes) logits.

    ``resnet18`` is torchvision's in the form used on CIFAR: images this small would be gone after
    the strided 7x7 stem and the max-pool of the ImageNet form, so the stem is 3x3 with stride 1 and
    there is no max-pool. ``small-cnn`` is a few layers for quick looks and tests.
    """
    if name == "resnet18":
        return _resnet18(channels, classes)
    return _small_cnn(channels, classes)


def _resnet18(channels: int, classes: int) -> nn.Module:
    model: nn.Module = torchvision.models.resnet18(num_classes=classes)
    stem = nn.Conv2d(channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
    # As torchvision initialises its convolutions; the new one comes with torch's default.
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = stem
    model.maxpool = nn.Identity()
    return model


def _small_cnn(channels: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, classes),
    )
