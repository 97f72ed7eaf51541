"""The files that hold what one rank has of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from commhooks.errors import CheckpointError

__all__ = [
    "FORMAT",
    "objects_file",
    "rank_file",
    "read",
    "remove_others",
    "saved_sizes",
    "write",
]

FORMAT = 2
"""Version of the files' layout; a later one that reads differently gets another number.

2 added several states, the files of objects, and the number of models that Accelerate wrote.
"""

_PATTERN = re.compile(r"commhooks-(objects-)?rank-(\d{5})-of-(\d{5})\.(?:pt|pkl)")


def rank_file(rank: int, size: int) -> str:
    """The name of the file with a rank's tensors and plain values."""
    return f"commhooks-rank-{rank:05d}-of-{size:05d}.pt"


def objects_file(rank: int, size: int) -> str:
    """The name of the file with a rank's objects, which only their own classes understand."""
    return f"commhooks-objects-rank-{rank:05d}-of-{size:05d}.pkl"


def saved_sizes(folder: Path) -> set[int]:
    """On how many ranks a checkpoint was saved; several numbers, if a save was cut short."""
    return {int(found[3]) for found in _all(folder) if not found[1]}


def remove_others(folder: Path, size: int) -> None:
    """Remove what an earlier save on another number of ranks has left."""
    for found in _all(folder):
        if int(found[3]) != size:
            (folder / found[0]).unlink(missing_ok=True)


def write(values: Mapping[str, Any], path: Path) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("wb") as file:
        torch.save({"format": FORMAT, **values}, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read(path: Path, *, weights_only: bool = True) -> Mapping[str, Any]:
    """What :func:`write` wrote.

    Raises:
        CheckpointError: the file is missing, damaged or of another format.
    """
    try:
        saved: object = torch.load(path, map_location="cpu", weights_only=weights_only)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.") from error
    except Exception as error:
        # A damaged file makes torch.load raise anything.
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    found = saved.get("format") if isinstance(saved, dict) else None
    if not isinstance(saved, dict) or found != FORMAT:
        raise CheckpointError(f"{path} is of format {found!r}, this version reads {FORMAT}.")
    return saved


def _all(folder: Path) -> list[re.Match[str]]:
    matches = (_PATTERN.fullmatch(path.name) for path in folder.iterdir())
    return [match for match in matches if match]
