"""What a state has done so far, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Stats"]


@dataclass(frozen=True)
class Stats:
    r"""A snapshot of one rank's counters; take a new one with ``state.stats``.

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
            they were drawn to it; with islands, over this rank's share. Of a fragment of more than
            65,536 parameters, every k-th is looked at, and the norm estimated from them. 0.0 before
            the first boundary.
        foreign_collectives: collectives that something else has started, between one local step
            and the next, on process groups that join workers: the default group, the model's, and
            every other that is not the library's own. Each of them makes the workers wait for one
            another, which ``seconds_exposed`` knows nothing of. What was sent up to the end of an
            ``averaged()`` or a ``finish()``, as by an evaluation, is not counted. Counted since
            registration; 0 while gradients are averaged.
        tau: steps from one launch of a fragment to its next, now.
        relative_drift: how far the workers were apart at the last launch,
            :math:`\sqrt{\frac{1}{m} \sum_i \|x_i - z\|^2} / \|z\|`, where z is what they
            have in common: the anchor, the global model, or the last mean.
        agreement: whether they went the same way, :math:`\|\frac{1}{m} \sum_i \Delta_i\|` over
            the mean of the :math:`\|\Delta_i\|`, with :math:`\Delta_i = x_i - z`: 1 if all
            made the same move, about :math:`1 / \sqrt m` if the moves are noise.
        step_seconds: time of a step without waiting, on the slowest rank.
        round_seconds: time in flight of one round of all fragments, as the rank saw it that
            launched last.
        loss: mean over all ranks of the losses that :meth:`CommHookState.observe` was told between
            the last two launches; None if none were.
        first_loss: the first such mean that was above 0.
        last_rate: the largest learning rate of any rank at the launch before the last one. Only
            :mod:`periods <commhooks.periods>` are told it; else it is None.

    The last seven are the same on every rank. They come with a round, so they are those of the last
    round that was waited for, also after :meth:`CommHookState.finish`, or 0.0 before there is one.
    Drift and agreement are of every k-th parameter of a fragment with more than 65,536 of them, k
    as small as possible. With islands the agreement is that of one round earlier.
    """

    step: int = 0
    rounds_launched: int = 0
    rounds_completed: int = 0
    bytes_reduced: int = 0
    seconds_exposed: float = 0.0
    seconds_hidden: float = 0.0
    consensus_distance: float = 0.0
    foreign_collectives: int = 0
    tau: int = 0
    relative_drift: float = 0.0
    agreement: float = 0.0
    step_seconds: float = 0.0
    round_seconds: float = 0.0
    loss: float | None = None
    first_loss: float | None = None
    last_rate: float | None = None
