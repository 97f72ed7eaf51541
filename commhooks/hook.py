"""The one DDP communication hook of the library."""

# No ``from __future__ import annotations`` here: DDP compares the hook's annotations with types,
# and annotations turned into strings make it refuse the hook.
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from commhooks.engine.steps.reducers import refuse_python_reducer
from commhooks.errors import RegistrationError

if TYPE_CHECKING:
    from commhooks.engine.state import CommHookState

__all__ = ["comm_hook"]


def comm_hook(
    state: "CommHookState",
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """DDP communication hook that lets ``state`` decide what happens to a gradient bucket.

    ``state.register(ddp_model, optimizer)`` registers it. The bare PyTorch form works too:
    ``ddp_model.register_comm_hook(state, commhooks.comm_hook)``. The state then learns its
    model at its first forward and the optimizers when they first step; a loop that uses GradScaler
    must not put a collective of its own right after a skipped step.

    Args:
        state: one of the package's states, such as :class:`commhooks.OverlapLocalSGD`.
        bucket: the gradients of some parameters, flat, not divided by the world size.

    Returns:
        A future of the bucket's flat gradient, averaged over the ranks during warm-up and this
        rank's own afterwards.

    Raises:
        RegistrationError: ``state`` is no state, the gradients are sparse, or (bare form, first
            backward) the ranks disagree on the algorithm, its hyper-parameters or the parameters.
    """
    # DDP hands on whatever it was given as a state: also None, or a class that nobody called.
    if isinstance(state, type) or not hasattr(state, "reduce_gradients"):
        given = f"the class {state.__name__}" if isinstance(state, type) else repr(state)
        raise RegistrationError(
            f"comm_hook needs a state of this package, and DDP was given {given} for it. A DDP "
            "model keeps its first hook, so wrap the module in a new DistributedDataParallel; then "
            "build a state, such as state = commhooks.LocalSGD(tau=8), and call "
            "state.register(ddp_model, optimizer), or "
            "ddp_model.register_comm_hook(state, commhooks.comm_hook)."
        )
    if isinstance(bucket, tuple):
        refuse_python_reducer()
    return state.reduce_gradients(bucket)
