"""Where a run is, kept on disk: saved now and then and when asked to stop, and found again."""

import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import torch.distributed as dist
import tyro
from accelerate import Accelerator

from commhooks.checkpoints import Checkpoints, verify
from common.ctrl_c import leave
from common.errors import RecipeError
from common.options import require

__all__ = ["CheckpointOptions", "Keeper", "Stopped"]

_POSITION = "position-{:05d}.pt"


@dataclass(frozen=True)
class CheckpointOptions:
    """What is kept of a run that may be cut short."""

    checkpoint_every: Annotated[
        int | None, tyro.conf.arg(metavar="STEPS", help_behavior_hint="")
    ] = None
    """Optimizer steps between two checkpoints, in the folder checkpoints of --output-dir. SIGTERM
    and Ctrl-C then save one more and end the run."""
    keep: int = 3
    """Checkpoints to keep."""
    resume: Annotated[str, tyro.conf.arg(metavar="latest|DIR|none")] = "none"
    """latest: go on from the newest checkpoint that is whole, or start if there is none; DIR: from
    this one."""

    def __post_init__(self) -> None:
        require(self, "checkpoint_every", 1)
        require(self, "keep", 1)

    @property
    def enabled(self) -> bool:
        """Whether the run is kept at all."""
        return self.checkpoint_every is not None or self.resume != "none"


class Stopped(Exception):  # noqa: N818 - nothing is wrong
    """The run was asked to stop, and has saved a checkpoint."""


class Keeper:
    """Saves and finds the checkpoints of one run, on every worker.

    Args:
        accelerator: whose ``save_state`` and ``load_state`` know the state of training.
        options: when, and from where.
        folder: where checkpoints go.
        run: what the run depends on; a checkpoint of another is refused.
        period: steps from one look at whether anybody was asked to stop to the next.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        options: CheckpointOptions,
        folder: Path,
        run: Mapping[str, Any],
        period: int,
    ) -> None:
        self._accelerator = accelerator
        self._options = options
        self._run = json.dumps(run, sort_keys=True, default=str)
        self._checkpoints = Checkpoints(folder, keep=options.keep)
        self._saved_at = -1
        self._requests = _StopRequests(period) if options.enabled else None
        self.source = self._find()
        self.position: Mapping[str, Any] = self._read() if self.source else {}

    def restore(self) -> None:
        """Load the training state, once everything is prepared and registered."""
        if self.source is not None:
            self._accelerator.load_state(str(self.source))
            self._saved_at = self.position["step"]

    def look(self, step: int, position: Callable[[], Mapping[str, Any]]) -> None:
        """Save if it is time to, and stop if anybody was asked to. Collective, between two steps.

        Raises:
            Stopped: after saving, on all workers at the same step.
        """
        if self._requests is None:
            return
        stop = self._requests.agreed(step)
        every = self._options.checkpoint_every
        if stop or (every is not None and step > 0 and step % every == 0):
            self.save(step, position)
        if stop:
            raise Stopped(f"stopped after step {step}; go on with --resume latest")

    def save(self, step: int, position: Callable[[], Mapping[str, Any]]) -> None:
        """Save what ``position()`` and Accelerate say, unless that has been done. Collective."""
        if self._saved_at == step or not self._options.enabled:
            return
        rank, size = self._accelerator.process_index, self._accelerator.num_processes
        values = {**position(), "step": step, "workers": size, "run": self._run}

        def write(folder: Path) -> None:
            self._accelerator.save_state(str(folder))
            torch.save(values, folder / _POSITION.format(rank))

        self._checkpoints.save(step, write)
        self._saved_at = step

    def close(self) -> None:
        """Let signals do again what they did."""
        if self._requests is not None:
            self._requests.close()

    def _find(self) -> Path | None:
        resume = self._options.resume
        if resume == "latest":
            return self._checkpoints.newest()
        if resume != "none":
            reason = verify(Path(resume))
            if reason is not None:
                raise RecipeError(f"--resume {resume}: {reason}")
            return Path(resume)
        if self._options.enabled and any(self._checkpoints.folder.glob("checkpoint-*")):
            raise RecipeError(
                f"{self._checkpoints.folder} holds checkpoints of an earlier run: go on from them "
                "with --resume latest, or choose another --output-dir"
            )
        return None

    def _read(self) -> Mapping[str, Any]:
        assert self.source is not None
        path = self.source / _POSITION.format(self._accelerator.process_index)
        if not path.exists():
            path = self.source / _POSITION.format(0)
        position: dict[str, Any] = torch.load(path, weights_only=True)
        if position["workers"] != self._accelerator.num_processes:
            raise RecipeError(
                f"{self.source} is of {position['workers']} workers, not "
                f"{self._accelerator.num_processes}: this recipe's data and schedule depend on "
                "their number"
            )
        before, now = json.loads(position["run"]), json.loads(self._run)
        differences = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in sorted(before | now)
            if before.get(name) != now.get(name)
        ]
        if differences:
            raise RecipeError(f"{self.source} is of another run: {'; '.join(differences)}")
        return position


class _StopRequests:
    """SIGTERM and SIGINT, noted by any worker and agreed on by all.

    Every ``period`` steps the workers send each other a flag, and look at it a period later: by
    then it has arrived, so that nobody waits, and everybody finds the same.
    """

    def __init__(self, period: int) -> None:
        self._period = period
        self._asked = False
        self._group = dist.new_group(backend="gloo", group_desc="commhooks-stop-requests")
        self._sent: tuple[Any, torch.Tensor] | None = None
        self._before = {number: signal.signal(number, self._note) for number in _STOPPING}

    def agreed(self, step: int) -> bool:
        """Whether some worker had been asked to stop when the workers last told each other."""
        if step % self._period:
            return False
        stop = False
        if self._sent is not None:
            work, flag = self._sent
            work.wait()
            stop = bool(flag.item())
        flag = torch.tensor([float(self._asked)])
        self._sent = dist.all_reduce(flag, group=self._group, async_op=True), flag
        return stop

    def close(self) -> None:
        """Take in the last flag, and restore the handlers."""
        if self._sent is not None:
            self._sent[0].wait()
            self._sent = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        # A launcher that loses patience sends SIGKILL; a user presses Ctrl-C once more.
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, leave)


_STOPPING = (signal.SIGTERM, signal.SIGINT)
