"""What an algorithm is to the engine: update rules on flat vectors."""

from __future__ import annotations

from typing import Any

__all__ = ["Rules"]


class Rules:
    """Update rules of one algorithm, elementwise and in place.

    The engine keeps the flat vectors an algorithm asks for, and calls its rules with equally long
    1-D slices of them, by keyword: ``x`` (this rank's parameters), ``wire`` (the vector that is
    all-reduced) and one tensor for every name in :attr:`vectors`. Rules must be elementwise, since
    the engine chooses how to cut the model, and in place, since nothing is allocated after the
    first round.

    When the engine calls which rule::

        end of warm-up            start
        boundary, blocking        contribute, all-reduce, chain, mix
        boundary, overlapped      mix (with what the round before gave), contribute;
                                  all-reduce and chain are in flight until the next boundary

    In ``chain`` and ``mix``, ``wire`` holds the *mean* over ranks of what they contributed. An
    overlapped algorithm finds in its first ``mix`` what ``start`` left in the vectors.
    """

    synchronous: bool = False
    """Whether gradients are averaged at every step and parameters never."""

    overlapped: bool = False
    """Whether a round is used at the boundary after its own (True) or at its own (False)."""

    portable: bool = True
    """Whether every rank's vectors are the same between rounds, and so fit any number of ranks."""

    tau: int = 1
    """Steps from one boundary to the next."""

    @property
    def delay(self) -> int:
        """Steps from a round's launch to its use: 0 (blocking) to ``tau``."""
        return self.tau if self.overlapped else 0

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of the flat vectors kept besides ``wire``, each as long as the model."""
        return ()

    @property
    def reference(self) -> str:
        """Name of the vector that ``mix`` draws ``x`` to; the consensus distance is ``x`` to it."""
        return "wire"

    def resolve(self, m: int) -> None:
        """Fix the hyper-parameters that depend on the number of workers ``m``."""

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
