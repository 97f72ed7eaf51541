"""Pieces of a training loop: a stopwatch, a running mean, an evaluation over all workers."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

__all__ = [
    "Evaluation",
    "Mean",
    "Stopwatch",
    "evaluate_classifier",
    "evaluate_language_model",
    "over_workers",
    "progress_bar",
]


class Stopwatch:
    """Wall-clock time of what it is running for, in seconds, summed up over stretches.

    Args:
        device: what the work runs on; its queue counts as part of a stretch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0.0
        self._since: float | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time inside the block, up to the end of what it left the device to do."""
        self._since = time.perf_counter()
        try:
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        finally:
            self._before = self.seconds
            self._since = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block out of what `running` counts around it."""
        self._before, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = time.perf_counter()

    def go_on_from(self, seconds: float) -> None:
        """Count on from what was counted before a restart."""
        self._before = seconds

    @property
    def seconds(self) -> float:
        """Time counted so far."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._before + running


class Mean:
    """Mean of scalars since it was last taken; they stay on their device until then."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._last = float("nan")

    def add(self, value: Tensor) -> None:
        """Count in a scalar tensor."""
        self._values.append(value.detach())

    @property
    def values(self) -> list[float]:
        """What has been counted in since it was last taken."""
        return [value.item() for value in self._values]

    def take(self) -> float:
        """The mean, from which the next begins empty. Where nothing was added since, the last."""
        if self._values:
            self._last = torch.stack(self._values).float().mean().item()
            self._values.clear()
        return self._last


@dataclass(frozen=True)
class Evaluation:
    """How a model does on the test set; None where something is not measured.

    Attributes:
        loss: cross-entropy, in nats.
        accuracy: in [0, 1].
        bits_per_byte: of text.
    """

    loss: float
    accuracy: float | None = None
    bits_per_byte: float | None = None

    def measured(self) -> dict[str, float]:
        """What was measured, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        words = [f"test loss {self.loss:.4f}"]
        if self.accuracy is not None:
            words.append(f"test accuracy {self.accuracy:.1%}")
        if self.bits_per_byte is not None:
            words.append(f"bits per byte {self.bits_per_byte:.3f}")
        return "  ".join(words)


@torch.no_grad()
def evaluate_classifier(
    accelerator: Accelerator, model: nn.Module, loader: DataLoader[tuple[Tensor, int]]
) -> Evaluation:
    """Loss and accuracy over the whole of a prepared ``loader``, the same on every rank.

    Collective: each rank computes its part of the test set.
    """
    logits, labels = [], []
    model.eval()
    for images, targets in loader:
        outputs = model(images)
        # Drops what Accelerate repeated to give every rank as many batches.
        outputs, targets = accelerator.gather_for_metrics((outputs, targets))
        logits.append(outputs.float())
        labels.append(targets)
    model.train()
    all_logits, all_labels = torch.cat(logits), torch.cat(labels)
    return Evaluation(
        loss=cross_entropy(all_logits, all_labels).item(),
        accuracy=(all_logits.argmax(dim=1) == all_labels).float().mean().item(),
    )


@torch.no_grad()
def evaluate_language_model(
    accelerator: Accelerator, model: nn.Module, loader: DataLoader[Tensor]
) -> Evaluation:
    """Loss a byte over the whole of a prepared ``loader`` of windows, the same on every rank.

    Collective: each rank computes its part of the windows.
    """
    losses = []
    model.eval()
    for windows in loader:
        logits = model(windows[:, :-1]).float()
        loss = cross_entropy(logits.transpose(1, 2), windows[:, 1:].long(), reduction="none")
        # One figure a window, so that the repeated ones can be dropped.
        losses.append(accelerator.gather_for_metrics(loss.mean(dim=1)))
    model.train()
    mean = torch.cat(losses).mean().item()
    return Evaluation(loss=mean, bits_per_byte=mean / math.log(2))


def over_workers(accelerator: Accelerator, value: float, by: Literal["mean", "max"]) -> float:
    """The mean or the largest of a figure that every worker has its own of. Collective."""
    own = torch.tensor([value], dtype=torch.float32, device=accelerator.device)
    values: list[float] = accelerator.gather(own).tolist()
    return max(values) if by == "max" else sum(values) / len(values)


def progress_bar(accelerator: Accelerator) -> Progress:
    """A bar that counts optimizer steps, on the main process alone."""
    return Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        transient=True,
        disable=not accelerator.is_main_process,
    )
