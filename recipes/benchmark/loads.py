"""What is trained: a model that computes nothing for a set time, and one that really computes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["Load", "LoadName", "Pretend", "build_load"]

LoadName = Literal["pretend", "resnet18"]

# 20 blocks of 740 x 740 weights and 740 biases: 10.97 M parameters in 40 tensors.
_BLOCKS = 20
_WIDTH = 740


class _Clock:
    """When the pretend accelerator is done with what the host has launched on it.

    Attributes:
        forward, backward: seconds a block takes; zero while nobody measures.
    """

    def __init__(self) -> None:
        self.forward = 0.0
        self.backward = 0.0
        self._busy_until = 0.0

    def launch(self, *_: Any) -> None:
        """The accelerator has been idle, and starts now."""
        self._busy_until = time.perf_counter()

    def wait(self, seconds: float) -> None:
        """Sleep until it is done with the next block, beside which the host has done its work."""
        self._busy_until += seconds
        time.sleep(max(0.0, self._busy_until - time.perf_counter()))


class _Sleeping(torch.autograd.Function):
    """Passes on what it is given, after a while; backward takes its time too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, clock: _Clock) -> Tensor:
        clock.wait(clock.forward)
        ctx.clock = clock
        ctx.shapes = weight.shape, bias.shape
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # Every number must exist, since all of them are sent; what they are does not matter.
        weight, bias = (torch.full(shape, 1e-3) for shape in ctx.shapes)
        ctx.clock.wait(ctx.clock.backward)
        return gradients[0], weight, bias, None


class Pretend(nn.Module):
    """A model on a pretend accelerator: its host sleeps while a step "computes" elsewhere.

    A host that waits for its GPU uses no core and no memory bandwidth, and the time of a step does
    not drift with what else the machine does. A third of it is forward, the rest backward. What the
    host does meanwhile, such as filling gradients, takes no time of its own.

    Args:
        step_seconds: time of a forward and backward together.
        blocks: number of layers.
        width: a layer has ``width * width + width`` parameters.
    """

    def __init__(self, step_seconds: float, blocks: int = _BLOCKS, width: int = _WIDTH) -> None:
        super().__init__()
        self.step_seconds = step_seconds
        self._clock = _Clock()
        self.weights = nn.ParameterList(torch.zeros(width, width) for _ in range(blocks))
        self.biases = nn.ParameterList(torch.zeros(width) for _ in range(blocks))
        self.computing(True)

    def computing(self, on: bool) -> None:
        """Let steps take their time, or none."""
        per_block = self.step_seconds / len(self.weights) if on else 0.0
        self._clock.forward, self._clock.backward = per_block / 3, per_block * 2 / 3

    def forward(self, x: Tensor) -> Tensor:
        """``x``, after a third of the step's time."""
        self._clock.launch()
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = _Sleeping.apply(x, weight, bias, self._clock)  # type: ignore[no-untyped-call]
        if x.requires_grad:
            x.register_hook(self._clock.launch)  # type: ignore[no-untyped-call]
        return x


@dataclass(frozen=True)
class Load:
    """A model and a batch for it.

    Attributes:
        model: what DDP wraps.
        batch: its input, the same at every step.
        loss: of the model's output.
    """

    model: nn.Module
    batch: Tensor
    loss: Callable[[Tensor], Tensor]


def build_load(name: LoadName, step_seconds: float, size: float = 1.0) -> Load:
    """A new load; ranks that seed alike get the same.

    Args:
        name: which one.
        step_seconds: of the pretend accelerator.
        size: scales the pretend accelerator's number of parameters.
    """
    if name == "pretend":
        blocks = max(1, round(_BLOCKS * size))
        return Load(Pretend(step_seconds, blocks), torch.ones(1, requires_grad=True), torch.sum)
    # torchvision takes seconds to import, which the pretend accelerator need not wait for.
    from common.models import build_model

    labels = torch.arange(32) % 10
    return Load(
        build_model("resnet18", channels=1, classes=10),
        torch.rand(32, 1, 8, 8),
        lambda output: nn.functional.cross_entropy(output, labels),
    )
