"""The text the language recipe trains on, as windows of bytes."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from common.errors import RecipeError
from common.partitions import Indices

__all__ = ["STRETCHES", "Text", "load_text", "python_text", "read_text", "whole_batches"]

# What a partition takes for classes: neighbours in the text are alike, far ends of it less so.
STRETCHES = 10
# The end of each stretch: all of the text is tested on, and only the first test byte of a stretch
# has a neighbour that was trained on.
_TEST_SHARE = 0.02


class Windows(Dataset[Tensor]):
    """Windows of ``context + 1`` bytes, uint8: all but the last to read, all but the first to say.

    A window begins with the last byte of the one before, so that every byte is said once.
    """

    def __init__(self, stretches: list[Tensor], context: int) -> None:
        parts = [part.unfold(0, context + 1, context) for part in stretches]
        self.windows = torch.cat(parts)
        self.labels: Indices = np.repeat(np.arange(len(parts)), [len(part) for part in parts])

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        return self.windows[index]


@dataclass(frozen=True)
class Text:
    """Windows to train on, each with the number of its stretch, and windows to test on."""

    train: Windows
    test: Windows

    @property
    def labels(self) -> Indices:
        """Of each window to train on, the stretch of the text it comes from."""
        return self.train.labels


def load_text(file: Path | None, context: int) -> Text:
    """Cut a file, or Python's own text, into windows; the end of each stretch is to test on.

    Raises:
        RecipeError: the file cannot be read, or is too short.
    """
    text = python_text() if file is None else read_text(file)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    stretches = data.tensor_split(STRETCHES)
    test_length = int(len(stretches[-1]) * _TEST_SHARE)
    if test_length <= context:
        least = int(STRETCHES * (context + 1) / _TEST_SHARE)
        raise RecipeError(
            f"the text has {len(text)} bytes; with a --context of {context} it takes {least}"
        )
    return Text(
        train=Windows([part[:-test_length] for part in stretches], context),
        test=Windows([part[-test_length:] for part in stretches], context),
    )


def whole_batches(windows: Windows, size: int) -> Subset[Tensor]:
    """As many of the first ``windows`` as fill batches of ``size``.

    Frameworks that spread a test set over workers fill up the last batch with samples of the first,
    which then count twice.

    Raises:
        RecipeError: they do not fill one.
    """
    if len(windows) < size:
        raise RecipeError(f"{len(windows)} windows to test on do not fill a batch of {size}")
    return Subset(windows, range(len(windows) - len(windows) % size))


def python_text() -> bytes:
    """The topics of Python's ``help()``, and the modules that lie right in its library's folder."""
    folder = Path(sysconfig.get_path("stdlib"))
    modules = sorted(folder.glob("*.py"), key=lambda path: path.name)
    pages = [topics[name].encode() for name in sorted(topics)]
    return b"\n".join([*pages, *(module.read_bytes() for module in modules)])


def read_text(file: Path) -> bytes:
    """A file's bytes.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise RecipeError(f"--text {file}: {error.strerror}") from error
