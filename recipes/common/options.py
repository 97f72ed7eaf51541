"""The options the recipes have in common, and how a recipe reads its command line."""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn, TypeVar

import tyro

from common.algorithms import AlgorithmName, AlgorithmOptions
from common.data import DatasetName
from common.errors import RecipeError
from common.partitions import Scheme
from common.session import MixedPrecision, is_main_worker

__all__ = [
    "AlgorithmOptions",
    "DataOptions",
    "FeedOptions",
    "FitOptions",
    "RunOptions",
    "TextOptions",
    "WandbMode",
    "read_command_line",
    "refuse",
    "require",
]

WandbMode = Literal["offline", "online", "disabled"]
Config = TypeVar("Config")


def _option(metavar: str) -> object:
    """An option that may be left out, and has no default to show."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True)
class FeedOptions:
    """Who gets which part of the data, and how much at a time."""

    partition: Scheme = "iid"
    """iid; dirichlet: label mixes drawn from Dirichlet(0.5); major-class: 64% of a worker's samples
    from one class."""
    batch_size: int = 32
    """Samples per step of one worker."""
    loader_workers: int = 0
    """Extra processes per worker that load and augment; 0 loads in the worker itself."""

    def __post_init__(self) -> None:
        require(self, "batch_size", 1)
        require(self, "loader_workers", 0)


@dataclass(frozen=True)
class DataOptions(FeedOptions):
    """What the workers train on, and who gets which part of it."""

    dataset: DatasetName = "digits"
    """digits ships with scikit-learn; cifar10 is read from --data-dir."""
    data_dir: Annotated[Path | None, _option("DIR")] = None
    """The folder that holds cifar-10-batches-py."""


@dataclass(frozen=True)
class TextOptions(FeedOptions):
    """What the workers train on, and who gets which part of it. The classes that a partition goes
    by are ten stretches of the text, from its beginning to its end."""

    text: Annotated[Path | None, _option("FILE")] = None
    """Text to train on; by default Python's own documentation and standard library."""
    context: int = 128
    """Bytes that the model sees at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "context", 2)


@dataclass(frozen=True)
class RunOptions:
    """How the run goes, and what is kept of it."""

    seed: int = 0
    """Decides the initial weights, the partition and the order of the data."""
    scale_lr: tyro.conf.FlagCreatePairsOff[bool] = False
    """Multiply the learning rate, whatever its schedule, by state.lr_factor: --lr is then what is
    right for DDP."""
    mixed_precision: MixedPrecision = "no"
    """Autocast; fp16 also scales the gradients and needs GPUs."""
    accumulate: int = 1
    """Batches whose gradients are added up for one optimizer step."""
    max_steps: Annotated[int | None, _option("STEPS")] = None
    """End after this many optimizer steps, whatever --epochs says; the learning rate goes as if the
    run went on."""
    until_accuracy: Annotated[float | None, _option("FRACTION")] = None
    """End after the first evaluation in which the consensus model's test accuracy is above this."""
    eval_every: Annotated[
        int | None, tyro.conf.arg(metavar="STEPS", help_behavior_hint="(default: an epoch)")
    ] = None
    """Optimizer steps between two evaluations of the consensus model."""
    log_every: int = 10
    """Optimizer steps between two records of the training metrics."""
    output_dir: Path = Path("runs")
    """Where everything the run writes goes."""
    json: Annotated[Path | None, _option("FILE")] = None
    """File to write the results to."""
    pace: Annotated[Path | None, _option("FILE")] = None
    """File to write to, early in the run, what its first steps took."""
    wandb: WandbMode = "offline"
    """offline needs no account and no network; wandb sync uploads such runs later."""
    project: str = "commhooks"
    """W&B project."""
    group: Annotated[str | None, _option("NAME")] = None
    """W&B group, for runs to be compared; by default recipe, data and model."""
    tags: Annotated[tuple[str, ...], _option("TAG [TAG ...]")] = ()
    """W&B tags besides those that say algorithm, data, model and partition."""

    def __post_init__(self) -> None:
        require(self, "seed", 0)
        require(self, "accumulate", 1)
        require(self, "max_steps", 1)
        require(self, "until_accuracy", 0)
        require(self, "eval_every", 1)
        require(self, "log_every", 1)


@dataclass(frozen=True)
class FitOptions:
    """What a framework that has a training loop of its own is told."""

    text: Annotated[Path | None, _option("FILE")] = None
    """Text to train on; by default Python's own documentation and standard library."""
    context: int = 64
    """Bytes that the model sees at once."""
    layers: int = 2
    """Blocks of attention and perceptron."""
    width: int = 64
    """Numbers that stand for a byte between two blocks."""
    heads: int = 2
    """Attention heads of a block; they share its width."""
    batch_size: int = 16
    """Samples per step of one worker."""
    max_steps: int = 300
    """Optimizer steps."""
    lr: float = 2e-3
    """Learning rate of AdamW."""
    clip: float = 1.0
    """Largest norm of a gradient, each worker's own; 0 leaves gradients as they are."""
    accumulate: int = 1
    """Batches whose gradients are added up for one optimizer step."""
    mixed_precision: MixedPrecision = "no"
    """Autocast; fp16 also scales the gradients and needs GPUs."""
    eval_every: int = 100
    """Optimizer steps between two evaluations of the consensus model."""
    log_every: int = 10
    """Optimizer steps between two records of the training metrics."""
    seed: int = 0
    """Decides the initial weights and the order of the data."""
    output_dir: Path = Path("runs")
    """Where everything the run writes goes."""
    json: Annotated[Path | None, _option("FILE")] = None
    """File to write the results to."""
    wandb: WandbMode = "offline"
    """offline needs no account and no network; wandb sync uploads such runs later."""
    project: str = "commhooks"
    """W&B project."""
    group: Annotated[str | None, _option("NAME")] = None
    """W&B group, for runs to be compared; by default the framework's name."""
    tags: Annotated[tuple[str, ...], _option("TAG [TAG ...]")] = ()
    """W&B tags besides the algorithm and the framework."""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "batch_size", "max_steps", "accumulate"):
            require(self, name, 1)
        require(self, "context", 2)
        require(self, "lr", 1e-12)
        for name in ("clip", "seed"):
            require(self, name, 0)
        for name in ("eval_every", "log_every"):
            require(self, name, 1)


def require(options: object, name: str, minimum: float) -> None:
    """Refuse an option below its minimum; None is whatever the option's default is.

    Raises:
        RecipeError: it is below.
    """
    value = getattr(options, name)
    if value is not None and not value >= minimum:
        raise RecipeError(f"--{name.replace('_', '-')} must be at least {minimum}, not {value}")


def read_command_line(
    config: type[Config], description: str, arguments: Sequence[str] | None = None
) -> Config:
    """The recipe's configuration from its command line; every worker reads the same.

    Help and errors are shown by one worker and end all of them. ``arguments`` stand in for those
    of this process.
    """
    # tyro's own switch for its output leaves out the errors that a constructor raises.
    silence = io.StringIO()
    with ExitStack() as stack:
        if not is_main_worker():
            stack.enter_context(redirect_stdout(silence))
            stack.enter_context(redirect_stderr(silence))
        preset = _preset(config, arguments)
        return tyro.cli(
            config,
            description=description,
            args=arguments,
            default=tyro.MISSING_NONPROP if preset is None else preset,
            config=(tyro.conf.OmitArgPrefixes,),
        )


def _preset(config: type[Config], arguments: Sequence[str] | None) -> Config | None:
    """The options that --preset stands for, where a recipe has such; the others override them."""
    preset: Callable[[str, AlgorithmName], Config] | None = getattr(config, "preset", None)
    if preset is None:
        return None
    # Read ahead of the rest, whose defaults depend on it. What is wrong with it, tyro says later.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", default="")
    first.add_argument("--algorithm", default=AlgorithmOptions.algorithm)
    try:
        known, _ = first.parse_known_args(arguments)
    except argparse.ArgumentError:
        return None
    return preset(known.preset, known.algorithm)


def refuse(error: Exception) -> NoReturn:
    """End this worker because of ``error``, which is the user's to mend; one worker shows it."""
    if is_main_worker():
        sys.stderr.write(f"error: {error}\n")
    raise SystemExit(2)
