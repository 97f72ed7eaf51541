"""An error out of a backward that leaves DDP fit for the next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch.autograd import Variable

__all__ = ["after_backward", "raise_after_backward"]


def raise_after_backward(error: BaseException) -> None:
    """Raise ``error`` from the backward under way, once DDP is through with it.

    Called in the hook of the last bucket. An error raised there would leave DDP in the middle of
    its reduction, and its next forward would refuse to run. DDP queues what ends the reduction
    right after this hook, so only a callback queued by a callback comes later.

    Outside a backward, where torch's Join calls the hook on a rank that is out of batches, it is
    raised at once.
    """

    def fail() -> NoReturn:
        raise error

    after_backward(fail)


def after_backward(check: Callable[[], None]) -> None:
    """Call ``check``, which may raise, when DDP is through with the backward under way.

    By then DDP has waited for all gradients. Outside a backward it is called at once.
    """
    if torch._C._current_graph_task_id() == -1:
        check()
    else:
        _queue(lambda: _queue(check))


def _queue(callback: Callable[[], None]) -> None:
    """Run ``callback`` at the end of the backward under way, after those queued before."""
    Variable._execution_engine.queue_callback(callback)
