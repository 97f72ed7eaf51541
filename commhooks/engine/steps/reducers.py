"""Ways of reducing gradients that leave no place for a state: DDP's other modes, and replicate."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commhooks.errors import RegistrationError

__all__ = [
    "hooks_of_replicate",
    "refuse_optimizers_in_backward",
    "refuse_other_reducers",
    "refuse_python_reducer",
    "refuse_replicate",
]

_REPLICATE = "torch.distributed._composable.replicate"


def refuse_other_reducers(ddp: DistributedDataParallel) -> None:
    """Refuse a DDP model that was built in a mode which calls hooks in another way, or not ours.

    Raises:
        RegistrationError: it was.
    """
    if getattr(ddp, "_use_python_reducer", False):
        refuse_python_reducer()
    if ddp.mixed_precision is not None:
        raise RegistrationError(
            "DistributedDataParallel(mixed_precision=...) needs DDP's only communication hook for "
            "itself. Leave it out, and use torch.autocast in the forward, or convert the module "
            "before it is wrapped, as in model.to(torch.bfloat16)."
        )
    refuse_optimizers_in_backward(ddp)


def refuse_python_reducer() -> None:
    """Say what DDP's Python reducer is.

    Raises:
        RegistrationError: always.
    """
    raise RegistrationError(
        'This DDP model was built with torch._dynamo.config.optimize_ddp = "python_reducer", which '
        "hands gradients to a hook one by one, in buckets of no kind, whether the model is "
        "compiled or not. Set it to True (its default) before the module is wrapped in "
        "DistributedDataParallel, and wrap it anew."
    )


def refuse_optimizers_in_backward(ddp: DistributedDataParallel) -> None:
    """Refuse optimizers that DDP itself steps, from a hook that it takes at its first forward.

    Raises:
        RegistrationError: there are some.
    """
    if any(hasattr(p, "_in_backward_optimizers") for p in ddp.module.parameters()):
        raise RegistrationError(
            "_apply_optimizer_in_backward has given the parameters optimizers which DDP steps from "
            "its only communication hook. Build the module without it, with one optimizer that is "
            "stepped after the backward, and register that: state.register(ddp_model, optimizer)."
        )


def refuse_replicate(model: type) -> None:
    """Refuse a module that was made a replica in place.

    Args:
        model: its type.

    Raises:
        RegistrationError: it was.
    """
    if any(base.__module__ == _REPLICATE for base in model.__mro__):
        raise RegistrationError(
            f"{model.__name__} was made by torch.distributed._composable.replicate, which builds "
            "its DDP model inside the first forward, where no state finds it, and ignores hooks "
            "that come later. Wrap the module itself: ddp_model = DistributedDataParallel(module), "
            "and register on that."
        )


def hooks_of_replicate(module: nn.Module) -> Iterable[object]:
    """What ``register_comm_hook`` of a module of ``replicate`` was given: hooks and states."""
    # Not imported for those who do not use it.
    replicated = sys.modules.get(_REPLICATE)
    if replicated is not None and isinstance(module, replicated.DDP):
        for args, kwargs in replicated.replicate.state(module)._comm_hook_args:
            yield from (*args, *kwargs.values())
