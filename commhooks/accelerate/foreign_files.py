"""Accelerate's own files in a checkpoint, looked through before Accelerate loads any of them.

It loads one after the other, so that a bad file leaves a run half loaded, and on one rank alone
where the ranks have folders of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from commhooks.errors import CheckpointError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["check", "check_shapes", "load", "shapes"]

_CUSTOM = re.compile(r"custom_checkpoint_\d+\.pkl")


def check(
    accelerator: Accelerator,
    models: Sequence[nn.Module],
    folder: Path,
    *,
    model_files: int,
    same_ranks: bool,
) -> None:
    """Check that Accelerate will be able to load a folder on this rank.

    Args:
        accelerator: that will load it.
        models: those that Accelerate will load, unless hooks of the script load some of them.
        folder: the checkpoint.
        model_files: how many models Accelerate itself has written. Hooks of the script may write
            the others.
        same_ranks: whether as many ranks load as have saved; the random states of further ranks
            do not exist.

    Raises:
        CheckpointError: a file is missing, damaged, or of other shapes; nothing has changed.
    """
    saved = [_model_shapes(folder, number) for number in range(model_files)]
    # With fewer files than models nobody but the script knows which file is whose.
    if len(saved) == len(models):
        for (name, sizes), model in zip(saved, models, strict=True):
            check_shapes(sizes, model, folder / name, tied=True)
    for number, optimizer in enumerate(accelerator._optimizers):
        name = _numbered("optimizer", number, ".bin")
        _check_groups(load(folder / name), optimizer, folder / name)
    for number in range(len(accelerator._schedulers)):
        load(folder / _numbered("scheduler", number, ".bin"))
    if accelerator.scaler is not None:
        load(folder / "scaler.pt")
    if same_ranks:
        load(folder / f"random_states_{accelerator.process_index}.pkl")
    found = sum(_CUSTOM.fullmatch(path.name) is not None for path in folder.iterdir())
    for number in range(len(accelerator._custom_objects)):
        load(folder / f"custom_checkpoint_{number}.pkl", weights_only=False)
    if found != len(accelerator._custom_objects):
        raise CheckpointError(
            f"{folder} has {found} files custom_checkpoint_N.pkl, and this run has given "
            f"{len(accelerator._custom_objects)} objects to register_for_checkpointing, "
            "commhooks.accelerate.checkpoint's own included."
        )


def load(path: Path, **options: Any) -> Any:
    """A file as Accelerate reads it, mapped into memory where that is possible.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    from accelerate.utils import load as load_as_accelerate

    if not path.exists():
        raise CheckpointError(f"{path} is missing.")
    try:
        return load_as_accelerate(path, map_location="cpu", mmap=True, **options)
    except Exception as error:
        # A damaged file makes torch.load raise anything.
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a state dictionary."""
    return {name: tuple(v.shape) for name, v in values.items() if isinstance(v, Tensor)}


def check_shapes(
    saved: Mapping[str, tuple[int, ...]], model: nn.Module, source: Path, *, tied: bool = False
) -> None:
    """Compare the shapes in a file with those of a model.

    Args:
        saved: shapes by name.
        model: what the file will be loaded into.
        source: the file, for the message.
        tied: whether a tensor that has several names may be in the file under one of them.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    own = model.state_dict(keep_vars=True)
    here = shapes(own)
    there = {id(own[name]) for name in saved if name in own} if tied else set()
    names = [
        name
        for name in {**saved, **here}
        if saved.get(name) != here.get(name) and not (name not in saved and id(own[name]) in there)
    ]
    if names:
        raise CheckpointError(
            f"{source} is of another model: {len(names)} parameters or buffers differ, such as "
            f"{names[0]!r}, {saved.get(names[0], 'absent')} in the checkpoint and "
            f"{here.get(names[0], 'absent')} here."
        )


def _model_shapes(folder: Path, number: int) -> tuple[str, dict[str, tuple[int, ...]]]:
    from safetensors import safe_open

    name = _numbered("model", number, ".safetensors")
    if not (folder / name).exists():
        other = _numbered("pytorch_model", number, ".bin")
        if not (folder / other).exists():
            raise CheckpointError(f"{folder / name} is missing, and {other} as well.")
        return other, shapes(load(folder / other))
    try:
        with safe_open(folder / name, framework="pt") as file:
            # It is no mapping, whatever it looks like.
            keys = list(file.keys())
            return name, {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    except Exception as error:
        # safetensors has an error type of its own, besides those of the file system.
        raise CheckpointError(f"{folder / name} cannot be read: {error}") from error


def _check_groups(saved: Mapping[str, Any], optimizer: Any, path: Path) -> None:
    before = [len(group["params"]) for group in saved["param_groups"]]
    here = [len(group["params"]) for group in optimizer.param_groups]
    if before != here:
        raise CheckpointError(
            f"{path} is of another optimizer: its parameter groups hold {before} parameters, here "
            f"{here}."
        )


def _numbered(stem: str, number: int, suffix: str) -> str:
    return f"{stem}_{number}{suffix}" if number else f"{stem}{suffix}"
