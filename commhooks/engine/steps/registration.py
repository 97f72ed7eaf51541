"""Everything that can be wrong with a registration, found before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from commhooks.engine.steps.kept_weights import check_optimizer
from commhooks.engine.steps.model import has_hook
from commhooks.engine.steps.optimizers import owned, unwrapped
from commhooks.engine.steps.reducers import refuse_other_reducers, refuse_replicate
from commhooks.errors import RegistrationError

__all__ = [
    "check_group",
    "check_model",
    "check_optimizers",
    "check_pruning",
    "check_scaler",
    "parameter_facts",
    "refuse_unknown",
    "require_known_groups",
    "require_process_group",
    "synchronized_parameters",
    "trainable",
]


def require_process_group() -> None:
    """Raise unless torch.distributed is ready.

    Raises:
        RegistrationError: no process group is initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RegistrationError(
            "No process group is initialised; call torch.distributed.init_process_group (or "
            "build accelerate.Accelerator) before registering a state."
        )


def require_known_groups(*groups: object) -> None:
    """Raise unless each of ``groups`` that is a process group is one of torch.distributed's.

    Raises:
        RegistrationError: one is not, so that there is nothing to tell the other ranks with.
    """
    for group in groups:
        if not isinstance(group, dist.ProcessGroup):
            continue
        try:
            dist.get_process_group_ranks(group)
        except KeyError:
            kind = type(group)
            raise RegistrationError(
                f"torch.distributed does not know the ranks of the {kind.__name__} "
                f"({kind.__module__}) that was given, as a state's process_group or island or as "
                "the DDP model's own, or it has been destroyed. Rounds need ranks that stay the "
                "same: use a group of init_process_group, new_group or a DeviceMesh. torchft's "
                "groups and its DistributedDataParallel, whose ranks come and go, cannot be used; "
                "wrap the module in torch.nn.parallel.DistributedDataParallel."
            ) from None


def check_model(
    ddp: DistributedDataParallel | None, given: type, *, hooked: bool = False
) -> DistributedDataParallel:
    """The DDP model that was found in what was given.

    Args:
        ddp: the model, if there is one.
        given: the type of what was given.
        hooked: whether it should have a communication hook already.

    Raises:
        RegistrationError: there is none, it has a hook already, it was built in a mode that goes
            without such a hook or averages some gradients outside of it, or it makes sparse
            gradients.
    """
    if ddp is None:
        refuse_replicate(given)
        raise RegistrationError(
            f"model must be a torch.nn.parallel.DistributedDataParallel, got "
            f"{given.__name__}; wrap the model in DistributedDataParallel, or take what "
            "accelerator.prepare returns, on more than one process, and register that. (On a "
            "machine without GPUs Accelerate makes one only if the script says "
            "Accelerator(cpu=True).)"
        )
    if ddp._delay_all_reduce_params:
        raise RegistrationError(
            "The DDP model was built with delay_all_reduce_named_params, which averages gradients "
            "outside of the communication hook. Leave delay_all_reduce_named_params and "
            "param_to_hook_all_reduce out."
        )
    refuse_other_reducers(ddp)
    if not hooked and (getattr(ddp, "_comm_hooks", None) or has_hook(ddp)):
        raise RegistrationError(
            "This DDP model has a communication hook already, and DDP takes one for life; wrap "
            "the module in a new DistributedDataParallel and register there, once."
        )
    for name, module in ddp.module.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise RegistrationError(
                f"Module {name!r} makes sparse gradients, which a DDP communication hook cannot "
                "take; build it with sparse=False."
            )
    if not synchronized_parameters(ddp):
        raise RegistrationError("The model has no parameter that requires a gradient.")
    return ddp


def check_pruning(module: nn.Module, local_after: int | None) -> None:
    """Refuse layers that prune by gradients while those are a rank's own.

    peft's AdaLoRA decides with each rank's gradients which ranks of its matrices to keep, and keeps
    the decision in Python, where nobody can send it. After a known step all is decided.

    Args:
        module: the model.
        local_after: steps whose gradients are averaged; None for all.

    Raises:
        RegistrationError: it would prune by local gradients.
    """
    if local_after is None:
        return
    for each in module.modules():
        allocator: Any = getattr(each, "rankallocator", None)
        if type(allocator).__name__ != "RankAllocator":
            continue
        config = allocator.peft_config
        decided = config.total_step - config.tfinal
        if local_after <= decided:
            raise RegistrationError(
                f"AdaLoRA prunes by gradients up to step {decided} (total_step - tfinal), and "
                "every worker would prune by its own, and end with another rank_pattern. Take "
                "plain LoRA (peft.LoraConfig), or begin local steps later, with "
                f"warmup_steps={decided + 1}."
            )


def check_optimizers(optimizers: Sequence[object], parameters: Sequence[Tensor]) -> list[Optimizer]:
    """The optimizers in ``optimizers``, out of Accelerate's wrappers.

    Raises:
        RegistrationError: there is none, one is no optimizer, or one owns no parameter.
    """
    if not optimizers:
        raise RegistrationError(
            "No optimizer was given; pass those that update the model: "
            "state.register(ddp_model, optimizer)."
        )
    found = []
    ids = {id(parameter): parameter for parameter in parameters}
    for wrapped in optimizers:
        optimizer = unwrapped(wrapped)
        if not isinstance(optimizer, Optimizer):
            raise RegistrationError(
                f"Expected a torch.optim.Optimizer, got {type(wrapped).__name__}; the form is "
                "state.register(ddp_model, optimizer, scaler=scaler), with the optimizer that a "
                "wrapper of your own wraps."
            )
        # Optimizer.__init__ makes them; some wrappers inherit without calling it.
        if not hasattr(optimizer, "_optimizer_step_post_hooks"):
            raise RegistrationError(
                f"{type(optimizer).__name__} never called torch.optim.Optimizer.__init__, so it "
                "fires no hooks; pass the optimizer it wraps."
            )
        check_optimizer(optimizer)
        if not owned(optimizer, ids):
            raise RegistrationError(
                f"The {type(optimizer).__name__} owns none of the model's parameters that "
                "require gradients; build it from ddp_model.parameters()."
            )
        found.append(optimizer)
    return found


def check_scaler(scaler: object, optimizers: Sequence[object]) -> torch.amp.GradScaler | None:
    """The loop's GradScaler: the one given, or the one Accelerate or Fabric steps optimizers with.

    Raises:
        RegistrationError: it is no GradScaler.
    """
    if scaler is None:
        scaler = next((s for o in optimizers if (s := _scaler_of(o))), None)
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise RegistrationError(
            f"scaler must be the loop's torch.amp.GradScaler, got {type(scaler).__name__}."
        )
    return scaler


def _scaler_of(optimizer: object) -> object:
    """Accelerate's wrapper has it, and Fabric's has a strategy that does."""
    precision = getattr(getattr(optimizer, "_strategy", None), "precision", None)
    return getattr(optimizer, "scaler", None) or getattr(precision, "scaler", None)


def check_group(group: dist.ProcessGroup | None, ddp: DistributedDataParallel) -> None:
    """Check that ``group`` is made of the model's own ranks.

    Raises:
        RegistrationError: it is not.
    """
    if group is None:
        return
    given, own = (dist.get_process_group_ranks(g) for g in (group, ddp.process_group))
    if given != own:
        raise RegistrationError(
            f"The state's process group has the ranks {given}, the DDP model's {own}; build the "
            "state with process_group=ddp_model.process_group."
        )


def refuse_unknown(arguments: Mapping[str, object]) -> None:
    """Refuse arguments of ``register`` that it does not have.

    Raises:
        RegistrationError: there are some.
    """
    if arguments:
        raise RegistrationError(
            f"register takes no argument named {', '.join(arguments)}; optimizers are given by "
            "position, state.register(ddp_model, optimizer), a GradScaler as scaler=."
        )


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that require gradients, by name, in the module's order."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def synchronized_parameters(ddp: DistributedDataParallel) -> dict[str, Tensor]:
    """The parameters whose gradients DDP averages, by name, in the module's order."""
    return {
        name: parameter
        for name, parameter in trainable(ddp.module).items()
        if name not in ddp.parameters_to_ignore
    }


def parameter_facts(parameters: Mapping[str, Tensor]) -> dict[str, object]:
    """What ranks must agree on of their parameters, by name.

    Position and strides are part of it, since they decide where a number lies in a flat vector.
    """
    return {
        f"parameter {name}": (
            f"number {number}",
            tuple(p.shape),
            str(p.dtype),
            p.stride(),
            p.device.type,
        )
        for number, (name, p) in enumerate(parameters.items())
    }
