"""Fully synchronous SGD, the control."""

from __future__ import annotations

from commhooks.engine.state import CommHookState

__all__ = ["AllReduce"]


class AllReduce(CommHookState):
    r"""Fully synchronous SGD: gradients are averaged at every step, as by plain DDP.

    .. math:: g \leftarrow \frac{1}{m} \sum_i g_i

    The same mathematics as a DDP model without a hook, bit for bit, with this package's ``stats``.
    Extra memory: none. Payload: the gradients, every step.

    Args:
        process_group: ranks that train together; None means those of the DDP model.
        warmup_steps: taken for uniformity; every step is like a warm-up step.
        bucket_cap_mb: taken for uniformity; gradients travel in DDP's own buckets.
        average_buffers: as for every state, see :class:`~commhooks.engine.state.CommHookState`.

    Raises:
        HyperParameterError: an argument has the wrong type or lies outside its range.
    """

    synchronous = True
    tau = 1
