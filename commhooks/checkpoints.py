"""Folders of checkpoints: written whole or not at all, and verified before they are used.

Nothing here knows what a checkpoint holds; the ranks' only dealings are to agree.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import torch.distributed as dist

from commhooks.errors import CheckpointError
from commhooks.together import by_rank, gathered, together

__all__ = ["Checkpoints", "verify"]

logger = logging.getLogger("commhooks")

_NAME = "checkpoint-"
_ABANDONED = "abandoned-"
_REPLACED = "replaced-"
_DRAFT = ".draft-"
_PRESENT = ".present-"
_HEX = "[0-9a-f]"
_MANIFEST = "manifest.json"
_FORMAT = 1


class Checkpoints:
    """The numbered checkpoints of one run, ``checkpoint-00000042`` and so on, in one folder.

    Every rank makes one and calls its methods, which are collective. The ranks may share the folder
    or have one of this name each, as machines without a common file system do.

    The folder may hold what other tools have written, such as the ``checkpoint-5000`` of Hugging
    Face's Trainer. A checkpoint of this class has a number of at least eight digits and a
    ``manifest.json``; whatever has not is left alone.

    A checkpoint is written under another name; when every rank is done its files are flushed to
    disk, listed with their sizes and SHA-256 sums in ``manifest.json``, and the directory takes its
    name. A crash at any moment leaves the checkpoints that were there before.

    Args:
        folder: where they lie; made when the first is saved.
        keep: how many to keep, at least 1.
        process_group: the ranks that save together; None means all, or this process alone where
            ``torch.distributed`` is not initialised.

    Raises:
        ValueError: ``keep`` is below 1.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 3,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep!r}.")
        self.folder = Path(folder)
        self.keep = keep
        self._group = process_group

    def save(self, number: int, write: Callable[[Path], object]) -> Path:
        """Make checkpoint ``number``, and drop those beyond the last ``keep``. Collective.

        One of the same number is replaced. Those with higher numbers are of a course that the run
        has left by going on from an earlier one: they are renamed to ``abandoned-...``. Folders
        that this class has not written are neither replaced, renamed nor deleted.

        Args:
            number: orders the checkpoints, such as the step.
            write: puts this rank's files into the directory it is given, which exists. Collectives
                in it come before whatever can fail on one rank alone.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointError: the checkpoint's name is taken by something that this class has not
                written; or a rank could not write, which raises what ``write`` raised on that rank
                and CheckpointError on the others. No rank has a new checkpoint.
            RoundError: ``write`` raised it.
        """
        nonce, *_ = gathered(uuid4().hex, self._group)
        draft = self.folder / f"{_DRAFT}{nonce}"

        def write_draft() -> None:
            draft.mkdir(parents=True, exist_ok=True)
            (draft / f"{_PRESENT}{self._rank:08d}").touch()
            write(draft)

        target = self.folder / f"{_NAME}{number:08d}"
        # Now, since writing may take minutes, and again before the name is taken.
        self._together(f"{target} was not written", lambda: _refuse_to_replace(target))
        self._together(f"{target} was not written", write_draft)
        # One rank for each file system. All look before the first one takes the marks away.
        sealing, *_ = sorted(draft.glob(f"{_PRESENT}*"))
        chosen = sealing.name == f"{_PRESENT}{self._rank:08d}"
        gathered(None, self._group)
        self._together(
            f"{target} was not written",
            lambda: self._seal(draft, target) if chosen else None,
        )
        return target

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole, the same on every rank. Collective.

        Newer ones that are not are logged as errors, with the reason. A folder that is named as
        this class names them and has no manifest counts as one that is not whole: training must
        not start from the beginning because a file was lost.

        Returns:
            Its directory; None if there has never been a checkpoint.

        Raises:
            CheckpointError: there are checkpoints, and none is whole.
        """
        mine = _numbered(self.folder)
        numbers = sorted({n for theirs in gathered(sorted(mine), self._group) for n in theirs})
        places = gathered(_place(self.folder), self._group)
        verifies = places.index(_place(self.folder)) == self._rank
        for number in reversed(numbers):
            reason = verify(mine[number]) if number in mine and verifies else None
            if number not in mine:
                reason = "it is missing."
            reasons = gathered(reason, self._group)
            if not any(reasons):
                return mine[number]
            if self._rank == 0:
                logger.error(
                    "commhooks: checkpoint %s%08d is not used: %s",
                    _NAME,
                    number,
                    by_rank(reasons),
                )
        if numbers:
            raise CheckpointError(
                f"None of the {len(numbers)} checkpoints in {self.folder} is whole; the log says "
                "what is wrong with each. Move them away to start anew."
            )
        return None

    @property
    def _rank(self) -> int:
        return dist.get_rank(self._group) if dist.is_initialized() else 0

    def _together(self, complaint: str, action: Callable[[], object]) -> None:
        together(complaint, action, self._group)

    def _seal(self, draft: Path, target: Path) -> None:
        for mark in draft.glob(f"{_PRESENT}*"):
            mark.unlink()
        _write_manifest(draft)
        for path in (*_files(draft), *_directories(draft)):
            _flush(path)
        _refuse_to_replace(target)
        # Two steps, between which a crash leaves the old one under another name.
        replaced = self.folder / f"{_REPLACED}{target.name}"
        if target.exists():
            self._discard(replaced)
            target.rename(replaced)
        draft.rename(target)
        _flush(self.folder)
        self._discard(replaced)
        self._tidy(target)

    def _tidy(self, latest: Path) -> None:
        """Drop what is too old, what is on another course, and what crashes have left behind."""
        checkpoints = {n: path for n, path in _numbered(self.folder).items() if _is_ours(path)}
        for number in [n for n in checkpoints if n > int(latest.name.removeprefix(_NAME))]:
            left = checkpoints.pop(number)
            abandoned = self.folder / f"{_ABANDONED}{left.name}"
            self._discard(abandoned)
            left.rename(abandoned)
            logger.warning(
                "commhooks: %s is of a course that the run has left by saving %s; it is now %s.",
                left.name,
                latest.name,
                abandoned.name,
            )
        for number in sorted(checkpoints)[: -self.keep]:
            self._discard(checkpoints[number])
        # Named by a uuid4().hex, so that it can be nobody else's.
        for leftover in self.folder.glob(f"{_DRAFT}{_HEX * 32}"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _discard(self, checkpoint: Path) -> None:
        """Take away its name at once and its files at leisure."""
        if checkpoint.exists():
            doomed = self.folder / f"{_DRAFT}{uuid4().hex}"
            checkpoint.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def verify(checkpoint: Path) -> str | None:
    """Why a checkpoint's directory is not what was saved; None if it is.

    Files that are not in the manifest are none of its business.
    """
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_bytes())
        if manifest["format"] != _FORMAT:
            return f"{_MANIFEST} is of format {manifest['format']!r}, this version reads {_FORMAT}."
        listed = {
            name: (int(facts["size"]), str(facts["sha256"]))
            for name, facts in manifest["files"].items()
        }
    except OSError as error:
        return f"{_MANIFEST} cannot be read: {error.strerror}."
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{_MANIFEST} is damaged: {error!r}."
    for name, (size, digest) in listed.items():
        try:
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}."
            if _digest(checkpoint / name) != digest:
                return f"{name} has another SHA-256 sum than when it was saved."
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}."
    return None


def _write_manifest(directory: Path) -> None:
    files = {
        path.relative_to(directory).as_posix(): {
            "size": path.stat().st_size,
            "sha256": _digest(path),
        }
        for path in _files(directory)
    }
    text = json.dumps({"format": _FORMAT, "files": files}, indent=1)
    (directory / _MANIFEST).write_text(text + "\n")


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def _directories(directory: Path) -> Iterator[Path]:
    yield from (path for path in directory.rglob("*") if path.is_dir())
    yield directory


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _numbered(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by number, whole or not.

    One that was being replaced counts where a crash has left no other of its number.
    """
    return {
        int(number): path
        for prefix in (f"{_REPLACED}{_NAME}", _NAME)
        for path in folder.glob(f"{prefix}*")
        # Other tools write checkpoint-5000, without the zeros.
        if (number := path.name.removeprefix(prefix)).isdecimal()
        and number == f"{int(number):08d}"
        and path.is_dir()
    }


def _is_ours(checkpoint: Path) -> bool:
    """Whether what bears a checkpoint's name was written by :class:`Checkpoints`.

    A manifest that cannot be read is damage to ours; one that says something else is another's.
    """
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_bytes())
    except OSError:
        return False
    except ValueError:
        return True
    return isinstance(manifest, dict) and {"format", "files"} <= manifest.keys()


def _refuse_to_replace(target: Path) -> None:
    """Raise if a checkpoint of this name would take the place of something that is not one.

    Raises:
        CheckpointError: it would.
    """
    # A broken link exists for rename(), though not for exists().
    if os.path.lexists(target) and not _is_ours(target):
        raise CheckpointError(
            f"{target} is there already and has no {_MANIFEST} of commhooks.checkpoints, so that "
            "it may be of another tool, and it is left as it is. Give the checkpoints a folder of "
            "their own, or move it away."
        )


def _place(folder: Path) -> tuple[str, int, int] | None:
    """Equal on two ranks only if they see the same folder."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return socket.gethostname(), found.st_dev, found.st_ino
