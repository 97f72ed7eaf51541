"""Grids: which runs a comparison is made of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from common.algorithms import AlgorithmName, AlgorithmOptions, hyper_parameters
from common.errors import RecipeError
from common.partitions import Scheme

__all__ = ["GRIDS", "Cell", "Grid", "Method", "parse_method"]


@dataclass(frozen=True)
class Method:
    """An algorithm and those of its hyper-parameters that a grid fixes; and a name, if it has one.

    Methods that differ in many hyper-parameters need a name: a picture has no room for them all.
    """

    algorithm: AlgorithmName
    fixed: tuple[tuple[str, str], ...] = ()
    name: str | None = None

    @property
    def label(self) -> str:
        """How tables and legends call it."""
        return self.name or self.spelled

    @property
    def spelled(self) -> str:
        """The algorithm and its hyper-parameters."""
        return " ".join([self.algorithm, *(f"{name}={value}" for name, value in self.fixed)])

    @property
    def has_tau(self) -> bool:
        """Whether there are steps between its averagings."""
        return "tau" in hyper_parameters(AlgorithmOptions(self.algorithm))

    def arguments(self) -> list[str]:
        """Its part of a recipe's command line."""
        words = ["--algorithm", self.algorithm]
        for name, value in self.fixed:
            words += [f"--{name.replace('_', '-')}", value]
        return words


@dataclass(frozen=True)
class Cell:
    """What is averaged over seeds; an algorithm that synchronises at every step has no tau.

    ``lr`` is None where a grid does not vary the learning rate.
    """

    method: Method
    tau: int | None
    partition: Scheme
    lr: float | None = None

    @property
    def label(self) -> str:
        """Its method, tau, learning rate and partition in one line."""
        return self.name()

    def name(self, *without: str) -> str:
        """The label, axes named in ``without`` left out."""
        axes = {
            "tau": None if self.tau is None else f"tau={self.tau}",
            "lr": None if self.lr is None else f"lr={self.lr:g}",
            "partition": self.partition,
        }
        words = [word for axis, word in axes.items() if word and axis not in without]
        return " ".join([self.method.label, *words])

    def arguments(self, seed: int) -> list[str]:
        """Its part of the command line of the run with ``seed``."""
        words = self.method.arguments()
        if self.tau is not None:
            words += ["--tau", str(self.tau)]
        if self.lr is not None:
            words += ["--lr", str(self.lr)]
        return [*words, "--partition", self.partition, "--seed", str(seed)]


@dataclass(frozen=True)
class Grid:
    """Every method with every tau and learning rate on every partition with every seed.

    ``options`` are further ones of the recipe, the same for all runs. Without any ``lr`` all runs
    have the learning rate that these say, or the recipe's own.

    With ``tuning`` seeds, every cell is run with them at every ``lr`` first, and with ``seeds`` at
    the best one only. ``only`` is then what is left of the cells.
    """

    algorithms: tuple[str, ...]
    tau: tuple[int, ...]
    partitions: tuple[Scheme, ...]
    seeds: tuple[int, ...]
    workers: int
    options: tuple[str, ...]
    lr: tuple[float, ...] = ()
    tuning: tuple[int, ...] = ()
    only: tuple[Cell, ...] = ()

    def with_changes(self, **changes: Any) -> "Grid":
        """The grid with these fields replaced, where they are not None."""
        return replace(self, **{name: v for name, v in changes.items() if v is not None})

    def methods(self) -> list[Method]:
        """The algorithms, read.

        Raises:
            RecipeError: one cannot be read, or there is none.
        """
        return list(dict.fromkeys(parse_method(text) for text in _some(self.algorithms)))

    def cells(self) -> list[Cell]:
        """All cells, in the order of tables; each once.

        Raises:
            RecipeError: there is nothing to run.
        """
        if self.only:
            return list(self.only)
        for values in (self.tau, self.partitions, self.seeds):
            _some(values)
        cells = [
            Cell(method, tau if method.has_tau else None, partition, lr)
            for partition in self.partitions
            for method in self.methods()
            for tau in self.tau
            for lr in self.lr or (None,)
        ]
        return list(dict.fromkeys(cells))

    def runs(self) -> list[tuple[Cell, int]]:
        """Cells and seeds, in the order of running: the first seed of everything comes first."""
        cells = self.cells()
        return [(cell, seed) for seed in dict.fromkeys(self.seeds) for cell in cells]


def parse_method(text: str) -> Method:
    """``overlap-local-sgd:alpha=0.6,beta=0.7`` as a method; ``NAME=`` before it gives it a name.

    Raises:
        RecipeError: it is written otherwise, or there is no such algorithm.
    """
    head, colon, rest = text.partition(":")
    called, equals, name = head.rpartition("=")
    if equals and not called:
        raise RecipeError(f"{text!r}: write a name as late={name}:...")
    known: tuple[AlgorithmName, ...] = get_args(AlgorithmName)
    algorithm = next((other for other in known if other == name), None)
    if algorithm is None:
        raise RecipeError(f"{name!r} is no algorithm; there are {', '.join(known)}")
    fixed = []
    for pair in rest.split(",") if colon else []:
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise RecipeError(f"{text!r}: write hyper-parameters as {name}:alpha=0.6,beta=0.7")
        if key == "tau":
            raise RecipeError(f"{text!r}: tau is an axis of its own; use --tau")
        if key == "lr":
            raise RecipeError(f"{text!r}: lr is an axis of its own; use --lr")
        fixed.append((key, value))
    return Method(algorithm, tuple(fixed), called or None)


def _some(values: Sequence[Any]) -> Sequence[Any]:
    if not values:
        raise RecipeError("a grid needs at least one algorithm, tau, partition and seed")
    return values


_SMALL = ("--model", "small-cnn", "--epochs", "10")
# The methods of Wang, Liang & Joshi 2020, and what they are held against.
_PAPER = (
    *("ddp", "local-sgd", "overlap-local-sgd:beta=0", "overlap-local-sgd:beta=0.7"),
    *("easgd", "cocod-sgd", "bmuf"),
)
_SMALL_TRANSFORMER = (
    *("--layers", "1", "--width", "64", "--heads", "2", "--context", "64"),
    *("--batch-size", "8", "--max-steps", "384", "--eval-every", "384"),
    *("--lr-warmup-epochs", "0.005", "--sample", "0"),
)
# Tested sixteen times, so that there are curves.
_SMALL_TRANSFORMER_CURVES = (*_SMALL_TRANSFORMER, "--eval-every", "24")
_ROUNDED = ("", "compression=int8", "compression=int4", "compression=int4-without-feedback")


def _rounded(method: str) -> tuple[str, ...]:
    """A method with every kind of rounding, and one more to compare with."""
    return tuple(f"{method},{compression}".rstrip(",") for compression in _ROUNDED)


_TUNED = Grid(
    algorithms=(*_PAPER, "slowmo", "diloco:outer_momentum=0.5"),
    tau=(1, 2, 8, 24),
    partitions=("iid", "major-class"),
    seeds=(0, 1, 2, 3, 4),
    workers=2,
    options=_SMALL,
    lr=(0.0125, 0.025, 0.05, 0.1, 0.2, 0.4),
    tuning=(100,),
)

GRIDS = {
    # What `make compare` shows first: under a minute.
    "short": Grid(
        algorithms=("all-reduce", "local-sgd", "overlap-local-sgd:beta=0.7", "cocod-sgd"),
        tau=(8,),
        partitions=("iid",),
        seeds=(0, 1, 2),
        workers=2,
        options=_SMALL,
    ),
    # The table of Wang, Liang & Joshi 2020, on what a laptop has.
    "paper-small": Grid(
        algorithms=_PAPER,
        tau=(1, 2, 8, 24),
        partitions=("iid", "major-class"),
        seeds=(0, 1, 2),
        workers=4,
        options=("--model", "small-cnn", "--epochs", "60"),
    ),
    # The published claims, each algorithm at the learning rate that is best for it.
    "claims": _TUNED,
    # The same for recipes/language.py, whose text is shuffled.
    "claims-language": replace(
        _TUNED,
        partitions=("iid",),
        options=_SMALL_TRANSFORMER,
        lr=(0.0005, 0.001, 0.002, 0.004, 0.008),
    ),
    # What comes of following docs/choosing.md, from learning rates that were chosen for DDP.
    "newcomer": Grid(
        algorithms=(*_PAPER[:-1], "slowmo"),
        tau=(8,),
        partitions=("iid",),
        seeds=(0, 1, 2, 3, 4),
        workers=2,
        options=(*_SMALL, "--scale-lr"),
        lr=(0.05, 0.1),
    ),
    # Which learning rate suits which algorithm, on a short run.
    "learning-rates": Grid(
        algorithms=_PAPER,
        tau=(8,),
        partitions=("iid",),
        seeds=(0, 1, 2),
        workers=2,
        options=_SMALL,
        lr=(0.025, 0.05, 0.1, 0.15, 0.25, 0.5),
    ),
    # What rounding costs, with and without error feedback.
    "compression": Grid(
        algorithms=("ddp", *_rounded("overlap-local-sgd:beta=0.7")),
        tau=(8, 24),
        partitions=("iid",),
        seeds=(0, 1, 2),
        workers=2,
        options=("--model", "resnet18", "--epochs", "20", "--lr", "0.1"),
    ),
    # The same for recipes/language.py.
    "compression-language": Grid(
        algorithms=(
            *_rounded("overlap-local-sgd:beta=0.7"),
            *_rounded("diloco:outer_momentum=0.5,delay=tau/2,merge=carry"),
        ),
        tau=(8, 24),
        partitions=("iid",),
        seeds=(0, 1, 2),
        workers=2,
        options=_SMALL_TRANSFORMER,
    ),
    # How DiLoCo's workers take up a result that comes late; for recipes/language.py. The outer
    # momentum is below the paper's, which is for a tau of 500.
    "merges": Grid(
        algorithms=(
            "ddp",
            "diloco:outer_momentum=0.5",
            "diloco:outer_momentum=0.5,delay=tau/2",
            "diloco:outer_momentum=0.5,delay=tau/2,alpha=0.5",
            "diloco:outer_momentum=0.5,delay=tau/2,merge=carry",
            "diloco:outer_momentum=0.5,delay=tau/4,fragments=4,alpha=0.5",
        ),
        tau=(4, 16, 64),
        partitions=("iid",),
        seeds=(0, 1, 2),
        workers=2,
        options=_SMALL_TRANSFORMER,
    ),
    # Loss against seconds and megabytes on a slow link; for recipes/language.py and --link.
    "merging": Grid(
        algorithms=(
            "ddp",
            "blocking=diloco:outer_momentum=0.5",
            "replaced=diloco:outer_momentum=0.5,delay=tau/2",
            "blended=diloco:outer_momentum=0.5,delay=tau/2,alpha=0.5",
            "carried=diloco:outer_momentum=0.5,delay=tau/2,merge=carry",
            "streaming=diloco:outer_momentum=0.5,delay=tau/4,fragments=4,alpha=0.5",
            "int8=diloco:outer_momentum=0.5,delay=tau/2,alpha=0.5,compression=int8",
            "int4=diloco:outer_momentum=0.5,delay=tau/2,alpha=0.5,compression=int4",
        ),
        tau=(16,),
        partitions=("iid",),
        seeds=(0, 1, 2),
        workers=2,
        options=_SMALL_TRANSFORMER_CURVES,
    ),
}
