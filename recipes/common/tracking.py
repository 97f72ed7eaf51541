"""Weights & Biases: what a run is called, what is recorded, and against what it is drawn."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import wandb
from accelerate import Accelerator

import commhooks
from commhooks import Stats
from commhooks.frameworks import comm_metrics
from common.options import RunOptions

__all__ = ["RunIdentity", "Tracker", "versions"]

# Every record carries all of these, so that any metric can be drawn against any of them.
_AXES = ("train/step", "train/samples", "time/seconds")
# A W&B metric has one axis by default, so the main curves are there once for each.
_DRAWN_AGAINST = {
    "train/*": "train/step",
    "eval/*": "train/step",
    "comm/*": "train/step",
    "by_samples/*": "train/samples",
    "by_time/*": "time/seconds",
}
_REPEATED = {
    "train/loss": "train_loss",
    "eval/loss": "loss",
    "eval/accuracy": "accuracy",
    "eval/bits_per_byte": "bits_per_byte",
}
_PACKAGES = ("torch", "torchvision", "accelerate", "wandb", "numpy", "scikit-learn")


@dataclass(frozen=True)
class RunIdentity:
    """What tells one run from another."""

    name: str
    group: str
    job_type: str
    tags: tuple[str, ...]


def versions() -> dict[str, str]:
    """Of Python and of the packages that bear on a result."""
    return {
        "python": platform.python_version(),
        # Asked of the package itself, which may be used from a checkout without being installed.
        "commhooks": commhooks.__version__,
        **{package: version(package) for package in _PACKAGES},
    }


class Tracker:
    """The W&B run of one training run, on the main process; the other processes record nothing.

    Args:
        accelerator: made with ``log_with="wandb"``, unless ``options.wandb`` is ``"disabled"``.
        identity: name, group, job type and tags of the run.
        options: W&B mode and project, and the folder to write to.
        config: hyper-parameters and versions, plain values by name.
        run_id: W&B's id of the run that this one goes on with; None for a new one.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        identity: RunIdentity,
        options: RunOptions,
        config: Mapping[str, Any],
        run_id: str | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._run: wandb.Run | None = None
        if options.wandb == "disabled":
            return
        options.output_dir.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers(
            options.project,
            config=dict(config),
            init_kwargs={"wandb": _init_arguments(identity, options, run_id)},
        )
        if accelerator.is_main_process:
            self._run = accelerator.get_tracker("wandb", unwrap=True)
            for axis in _AXES:
                self._run.define_metric(axis)
            for pattern, axis in _DRAWN_AGAINST.items():
                self._run.define_metric(pattern, step_metric=axis)

    @property
    def run_id(self) -> str | None:
        """W&B's id of this process's run, if it has one."""
        return self._run.id if self._run else None

    @property
    def run_dir(self) -> Path | None:
        """The folder of this process's W&B run, if it has one."""
        return Path(self._run.dir).parent if self._run else None

    def log(
        self,
        metrics: Mapping[str, float],
        *,
        step: int,
        samples: int,
        seconds: float,
        stats: Stats | None,
    ) -> None:
        """Record ``metrics``, named like ``eval/accuracy``, at this point of the run.

        Args:
            metrics: what was measured, by prefixed name.
            step: optimizer steps so far.
            samples: samples seen so far, by all workers together.
            seconds: training time so far.
            stats: the algorithm's counters, if it has any.
        """
        curves = {_REPEATED[name]: metrics[name] for name in metrics.keys() & _REPEATED.keys()}
        record = {
            **dict(zip(_AXES, (step, samples, seconds), strict=True)),
            **metrics,
            **{f"by_samples/{name}": value for name, value in curves.items()},
            **{f"by_time/{name}": value for name, value in curves.items()},
        }
        if stats is not None:
            record |= comm_metrics(stats)
        self._accelerator.log(record)

    def summarise(self, results: Mapping[str, Any]) -> None:
        """Put the run's final results into its summary, as ``final/*``."""
        if self._run is not None:
            self._run.summary.update({f"final/{name}": value for name, value in results.items()})


def _init_arguments(
    identity: RunIdentity, options: RunOptions, run_id: str | None
) -> dict[str, Any]:
    # W&B makes the id part of the run's folder, so that a listing of folders tells runs apart too.
    slug = "-".join("".join(c if c.isalnum() or c == "." else " " for c in identity.name).split())
    return {
        "name": identity.name,
        "id": run_id or f"{slug[:96]}-{uuid4().hex[:6]}",
        # An offline run of the same id is a folder of its own, which `wandb sync` joins to the one.
        "resume": None if run_id is None else "allow",
        "group": identity.group,
        "job_type": identity.job_type,
        "tags": list(identity.tags),
        "dir": str(options.output_dir),
        "mode": options.wandb,
        # The recipe has its own table, and says itself where an offline run lies.
        "settings": wandb.Settings(quiet=True, silent=options.wandb == "offline"),
    }
