"""Checkpoints of an accelerated run that hold every rank, with one call to set up.

    state.register(model, optimizer)
    commhooks.accelerate.checkpoint(accelerator, state)
    accelerator.save_state(folder)
    accelerator.load_state(folder)

By itself Accelerate saves rank 0's model and optimizer and gives them to everyone, which between
two rounds is not what the other ranks had.
"""

from __future__ import annotations

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from commhooks.engine.checkpoint import check_identity
from commhooks.errors import CheckpointError, RegistrationError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from commhooks.engine.state import CommHookState

__all__ = ["checkpoint"]

logger = logging.getLogger("commhooks")

_FORMAT = 1
_FILE = "commhooks-rank-{:05d}-of-{:05d}.pt"
_PATTERN = re.compile(r"commhooks-rank-(\d{5})-of-(\d{5})\.pt")


def checkpoint(accelerator: Accelerator, state: CommHookState) -> None:
    """Make ``accelerator.save_state`` and ``load_state`` keep what each rank has of its own.

    Call it once, after ``state.register`` (or ``register_comm_hook``) and before the first
    ``save_state`` or ``load_state``; these become collective. Saving changes nothing of the run.

    - ``model.safetensors`` holds the consensus model, the one to evaluate or to publish.
    - ``commhooks-rank-R-of-N.pt`` holds rank R's parameters and buffers, the state of every
      prepared optimizer, of the GradScaler, and of ``state``: tensors and plain values.

    On another number of ranks than saved, ``load_state`` starts every rank from the consensus
    model, takes the anchor over where the algorithm has one, clears the optimizers' state, and logs
    what was reset.

    Args:
        accelerator: whose ``prepare`` the model and the optimizers went through.
        state: the registered state of the model.

    Raises:
        RegistrationError: the accelerator has a state already.
        CheckpointError: by ``load_state``, on every rank and before anything has changed: a rank's
            file is missing or damaged, or of another step, another algorithm, other
            hyper-parameters or another model.
        RoundError: by ``save_state``: a round failed.
    """
    if any(isinstance(other, _EveryRank) for other in accelerator._custom_objects):
        raise RegistrationError(
            "This accelerator checkpoints a commhooks state already, and one is all it can: two "
            "would write the same files. Use an Accelerator for every model that has a state."
        )
    ranks = _EveryRank(accelerator, state)
    accelerator.register_save_state_pre_hook(ranks.save)
    accelerator.register_load_state_pre_hook(ranks.read)
    # Accelerate loads these last, after it has given rank 0's optimizer to every rank.
    accelerator.register_for_checkpointing(ranks)


class _EveryRank:
    """What a rank saves besides Accelerate's files, and restores after them."""

    def __init__(self, accelerator: Accelerator, state: CommHookState) -> None:
        self._accelerator = accelerator
        self._state = state
        self._saved: Mapping[str, Any] | None = None

    @property
    def _rank(self) -> int:
        return int(self._accelerator.process_index)

    @property
    def _size(self) -> int:
        return int(self._accelerator.num_processes)

    def save(
        self, models: list[nn.Module], weights: list[dict[str, Tensor]], output_dir: str
    ) -> None:
        """Accelerate's hook before it writes ``weights``, one dictionary a model."""
        scaler = self._accelerator.scaler
        folder = Path(output_dir)
        own = {
            "format": _FORMAT,
            "commhooks": self._state.state_dict(),
            "models": [model.state_dict() for model in models],
            "optimizers": [each.state_dict() for each in self._accelerator._optimizers],
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        # The collective comes first: a full disk then fails one rank without stalling the others.
        with self._state.averaged():
            consensus = [_cloned(each) for each in weights]
        weights[:] = consensus
        _save_atomically(own, folder / _FILE.format(self._rank, self._size))
        if self._accelerator.is_local_main_process:
            for name, size in _rank_files(folder).items():
                if size != self._size:
                    (folder / name).unlink(missing_ok=True)

    def read(self, models: list[nn.Module], input_dir: str) -> None:
        """Accelerate's hook before it loads anything: refuse now, or not at all."""
        problem, step = None, None
        try:
            self._saved = self._checked(models, Path(input_dir))
            step = self._saved["commhooks"]["schedule"]["step"]
        except CheckpointError as error:
            problem = str(error)
        everyone: list[tuple[str | None, int | None]] = [(problem, step)] * self._size
        if self._size > 1:
            dist.all_gather_object(everyone, (problem, step))
        problems = [f"Rank {rank}: {why}" for rank, (why, _) in enumerate(everyone) if why]
        steps = [step for _, step in everyone]
        if not problems and len(set(steps)) > 1:
            problems = [
                f"{input_dir} holds the ranks at different steps, {steps}: saving it again was cut "
                "short. commhooks.checkpoints.Checkpoints never leaves such a folder."
            ]
        if problems:
            self._saved = None
            raise CheckpointError(" ".join(problems))

    def state_dict(self) -> dict[str, Any]:
        """What Accelerate writes for this object, from the main process alone: a mark."""
        return {"format": _FORMAT, "world_size": self._size}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Accelerate's last act of loading."""
        saved, self._saved = self._saved, None
        if saved is None:
            raise CheckpointError("Use accelerator.load_state to load a checkpoint.")
        if saved["commhooks"]["world_size"] == self._size:
            self._restore(saved)
        else:
            self._start_from_consensus(saved)

    def _restore(self, saved: Mapping[str, Any]) -> None:
        accelerator = self._accelerator
        for model, parameters in zip(accelerator._models, saved["models"], strict=True):
            model.load_state_dict(parameters)
        for optimizer, state in zip(accelerator._optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if accelerator.scaler is not None and saved["scaler"] is not None:
            accelerator.scaler.load_state_dict(saved["scaler"])
        self._state.load_state_dict(saved["commhooks"])

    def _start_from_consensus(self, saved: Mapping[str, Any]) -> None:
        """Accelerate has loaded the consensus model; it cannot know that the rest does not fit."""
        for optimizer in self._accelerator._optimizers:
            # Hyper-parameters such as the learning rate are every rank's; momenta were rank 0's.
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
        self._state.load_state_dict(saved["commhooks"])
        if self._rank == 0:
            logger.warning(
                "commhooks: the checkpoint is of %s ranks, this run has %s. Every rank starts from "
                "the consensus model; the state of %s optimizer(s) was reset, their "
                "hyper-parameters, the schedulers and the GradScaler are those of rank 0.",
                saved["commhooks"]["world_size"],
                self._size,
                len(self._accelerator._optimizers),
            )

    def _checked(self, models: list[nn.Module], folder: Path) -> Mapping[str, Any]:
        """This rank's part of the checkpoint, or rank 0's on another number of ranks."""
        sizes = set(_rank_files(folder).values())
        if not sizes:
            raise CheckpointError(
                f"{folder} holds no {_FILE.format(self._rank, self._size)}; it was not saved with "
                "commhooks.accelerate.checkpoint."
            )
        name = (
            _FILE.format(self._rank, self._size)
            if self._size in sizes
            else _FILE.format(0, max(sizes))
        )
        saved = _load(folder / name)
        identity = {
            "algorithm": type(self._state).__name__,
            "hyperparameters": self._state.hyperparameters(),
        }
        check_identity(saved["commhooks"], identity)
        found = len(saved["optimizers"])
        if found != len(self._accelerator._optimizers):
            raise CheckpointError(
                f"{name} has {found} optimizers, this run {len(self._accelerator._optimizers)}."
            )
        _check_shapes(saved["models"], models)
        return saved


def _load(path: Path) -> Mapping[str, Any]:
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.") from error
    except Exception as error:
        # A damaged file makes torch.load raise anything.
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if saved.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} is of format {saved.get('format')!r}, this version reads {_FORMAT}."
        )
    return saved


def _check_shapes(saved: list[dict[str, Any]], models: list[nn.Module]) -> None:
    if len(saved) != len(models):
        raise CheckpointError(f"The checkpoint has {len(saved)} models, this run {len(models)}.")
    for theirs, model in zip(saved, models, strict=True):
        before, here = _shapes(theirs), _shapes(model.state_dict())
        names = [n for n in before | here if before.get(n) != here.get(n)]
        if names:
            raise CheckpointError(
                f"The checkpoint is of another model: {len(names)} parameters or buffers differ, "
                f"such as {names[0]!r}, {before.get(names[0], 'absent')} in the checkpoint and "
                f"{here.get(names[0], 'absent')} here."
            )


def _shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(v.shape) for name, v in values.items() if isinstance(v, Tensor)}


def _cloned(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that later writes do not reach, in which tied tensors stay one tensor."""
    clones: dict[tuple[object, ...], Tensor] = {}
    # Accelerate looks for tied tensors in an OrderedDict only.
    copy: OrderedDict[str, Any] = OrderedDict()
    for name, value in weights.items():
        if isinstance(value, Tensor):
            key = value.data_ptr(), value.shape, value.stride(), value.dtype
            copy[name] = clones.setdefault(key, value.detach().clone())
        else:
            copy[name] = value
    return copy


def _rank_files(folder: Path) -> dict[str, int]:
    """The ranks' files in a checkpoint, and the number of ranks that each one names."""
    matches = (_PATTERN.fullmatch(path.name) for path in folder.iterdir())
    return {match.group(0): int(match.group(2)) for match in matches if match}


def _save_atomically(values: object, path: Path) -> None:
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("wb") as file:
        torch.save(values, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
