"""What an algorithm is to the engine: update rules on flat vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from commhooks.errors import CheckpointError

__all__ = ["Kept", "Part", "Rules", "weight_in_background"]


@dataclass(frozen=True)
class Part:
    """One parameter of a fragment, for what is not elementwise.

    Attributes:
        parameter: the model's parameter.
        vectors: its part of every flat vector, in the parameter's own shape. (Complex parameters
            are seen as real ones with a last dimension of two, and what this rank has of a
            parameter that is cut as a vector.)
        rate_change: the learning rate in force at the launch, the mean over the workers, divided by
            that at the launch before; 1 if either is 0 or not known.
    """

    parameter: Tensor
    vectors: Mapping[str, Tensor]
    rate_change: float | Tensor = 1.0


class Kept(Protocol):
    """What an algorithm keeps of a fragment besides vectors, such as an outer optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""

    def load_state_dict(self, saved: Any) -> None:
        """Go on from what :meth:`state_dict` gave."""


class Rules:
    """Update rules of one algorithm, in place.

    The engine keeps the flat vectors an algorithm asks for, and calls its elementwise rules with
    equally long 1-D slices of them, by keyword: ``x`` (this rank's parameters), ``wire`` (the
    vector that is all-reduced) and one tensor for every name in :attr:`vectors`. They must be
    elementwise, since the engine chooses how to cut the model, and in place, so that no memory of a
    model's size is asked for after the first round.

    When the engine calls which rule::

        end of warm-up      start, keep
        launch              contribute; all-reduce, prepare, chain and arrive are in flight
        landing             mix, ``delay`` steps after the launch

    In ``chain`` and ``mix``, ``wire`` holds the *mean* over ranks of what they contributed.
    ``prepare`` and ``arrive`` see a whole fragment, parameter by parameter.
    """

    synchronous: bool = False
    """Whether gradients are averaged at every step and parameters never."""

    overlapped: bool = False
    """Whether a round lands at the launch of the next one, and what ``start`` left in the vectors
    at the first launch."""

    portable: bool = True
    """Whether every rank's vectors are the same between rounds, and so fit any number of ranks."""

    tau: int | Literal["auto"] | Callable[..., int]
    """Steps from one launch to the next; or what chooses them, see :mod:`commhooks.periods`."""

    fragments: int | Sequence[Sequence[str]] = 1
    """How many parts of the model take turns, or the names of the parameters in each."""

    compression: str | None = None
    """What a round's numbers are rounded to, one of the codecs; None sends them as they are."""

    contributes_differences: bool = False
    """Whether ``contribute`` writes a difference to what all workers have, such as z - x."""

    @property
    def elementwise(self) -> bool:
        """Whether a parameter may be cut, so that the ranks of an island have a part each."""
        return True

    @property
    def delay(self) -> Any:
        """Steps from a round's launch to its landing: 0 (blocking) to ``tau``, as it was given."""
        return self.tau if self.overlapped else 0

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of the flat vectors kept besides ``wire``, each as long as the model."""
        return ()

    @property
    def looks_at_rates(self) -> bool:
        """Whether ``prepare`` has to be called."""
        return type(self).prepare is not Rules.prepare

    @property
    def reference(self) -> str:
        """Name of the vector that ``mix`` draws ``x`` to; the consensus distance is ``x`` to it."""
        return "wire"

    def rate_factor(self, m: int) -> float:
        """What a learning rate that is right for DDP is multiplied by.

        With the same gradient at every step, the consensus model of ``m`` workers then moves as far
        as DDP's would.
        """
        return 1.0

    @property
    def weight_of_x(self) -> float | None:
        """c, where ``mix`` is x <- c x + b and b is made of the vectors alone; None if it is not.

        b is then gathered inside an island ahead of the landing, in the background. ``mix`` may
        write to no vector but the wire. It is called with zeros for ``x`` where a round arrives,
        off the training thread and for several buckets at once, and so it may keep nothing on the
        object. A class that overrides ``mix`` has to say this anew.
        """
        return None

    def resolve(self, m: int) -> None:
        """Fix the hyper-parameters that depend on the number of workers ``m``."""

    def fit(self, parameters: Mapping[str, Tensor]) -> None:
        """Refuse a fragment's parameters that the algorithm cannot work on.

        Raises:
            RegistrationError: it cannot.
        """

    # Every algorithm's rules name its own vectors; `Any` lets their signatures differ.

    def start(self, *args: Any, **kwargs: Any) -> None:
        """Fill the vectors from the parameters ``x`` reached at the end of warm-up."""

    def contribute(self, *args: Any, **kwargs: Any) -> None:
        """Write into ``wire`` what this rank adds to the mean; by default its parameters."""
        kwargs["wire"].copy_(kwargs["x"])

    def chain(self, *args: Any, **kwargs: Any) -> None:
        """Update the vectors from the mean in ``wire``; called without ``x``, off its thread."""

    def mix(self, *args: Any, **kwargs: Any) -> None:
        """Draw the local parameters ``x`` to what the last round gave."""

    # On a whole fragment.

    def keep(self, parts: Sequence[Part]) -> Kept | None:
        """Make what is kept of a fragment besides vectors; called once, after ``start``."""
        return None

    def check_kept(self, parts: Sequence[Tensor], saved: object, *, launched: bool) -> None:
        """Refuse what a checkpoint holds of :meth:`keep`'s, if it does not fit.

        Args:
            parts: as a vector's in :meth:`keep`, but without numbers (on the device "meta").
            saved: what was saved of it; None if nothing was.
            launched: whether a round had been launched since ``keep``.

        Raises:
            CheckpointError: it does not fit.
        """
        if saved is not None:
            raise CheckpointError("The checkpoint is damaged: it holds more than was saved.")

    def prepare(self, parts: Sequence[Part]) -> None:
        """Look at the learning rates, before the first ``chain`` and off its thread.

        Not called where no rate has changed.
        """

    def arrive(self, kept: Any) -> None:
        """Do what needs all of a fragment's means, after the last ``chain`` and off its thread."""


def weight_in_background(rules: Rules) -> float | None:
    """The weight of x at a landing that can be prepared in the background; None at any other."""
    first = next(each for each in type(rules).__mro__ if {"mix", "weight_of_x"} & vars(each).keys())
    return rules.weight_of_x if rules.delay != 0 and "weight_of_x" in vars(first) else None
