"""What a state has done so far, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Stats"]


@dataclass(frozen=True)
class Stats:
    """A snapshot of one rank's counters; take a new one with ``state.stats``.

    Attributes:
        step: DDP backwards with gradient sync on, since registration; of a model of FSDP2, updates
            by all its optimizers.
        rounds_launched: parameter all-reduces started (a round counts once, whatever its buckets).
        rounds_completed: rounds whose result, chained update included, has arrived.
        bytes_reduced: payload handed to all-reduces by this rank (gradients while they are
            averaged, parameters after), in bytes, as it is sent: compressed, if it is. A ring
            all-reduce over m ranks puts 2 (m - 1) / m times as much on each rank's link. With
            islands this and the seconds below are of what goes between them, of which this rank has
            a share.
        seconds_exposed: time the training thread waited for communication.
        seconds_hidden: time communication was in flight while the training thread went on.
        consensus_distance: L2 norm, over the whole model, of this rank's parameters minus the
            vector they were last drawn to (the mean of the models, or the anchor), right before
            they were drawn to it; with islands, over this rank's share. 0.0 before the first
            boundary.
    """

    step: int = 0
    rounds_launched: int = 0
    rounds_completed: int = 0
    bytes_reduced: int = 0
    seconds_exposed: float = 0.0
    seconds_hidden: float = 0.0
    consensus_distance: float = 0.0
