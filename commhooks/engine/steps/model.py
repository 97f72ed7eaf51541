"""What a state watches on the model itself: its forwards, and what is done to its parameters."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from commhooks.engine.network.waiting import watch

__all__ = ["ModelWatch", "ParameterCheck", "unwrap_ddp", "when_forwarded"]


def unwrap_ddp(module: object) -> DistributedDataParallel | None:
    """The DDP model in ``module``, which may be a compiled one; None if there is none."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, DistributedDataParallel) else None


class ModelWatch:
    """Calls back before every forward of a model, and before ``load_state_dict`` on it.

    Args:
        model: the model.
        before_forward: called before a forward; with the model, if that is a DDP model.
        before_load: called before parameters are loaded; it may raise to forbid it.
    """

    def __init__(
        self,
        model: nn.Module,
        before_forward: Callable[..., None],
        before_load: Callable[[], None],
    ) -> None:
        # Of the module within, since that one may be loaded, too.
        module = model.module if isinstance(model, DistributedDataParallel) else model
        self._handles: list[RemovableHandle] = [
            module.register_load_state_dict_pre_hook(_Hook(before_load)),
            model.register_forward_pre_hook(_Hook(before_forward)),
        ]

    def close(self) -> None:
        """Call back no longer."""
        for handle in self._handles:
            handle.remove()


class _Hook:
    """A module's hook that keeps its target alive no longer than others do.

    A copy or a pickle of the module has one in its place that does nothing, and whose pickle loads
    where this package is not installed: a logger's method for messages that nobody wants.
    """

    def __init__(self, target: Callable[..., None]) -> None:
        self._target = weakref.WeakMethod(target)
        # Compiled, the futures and collectives of a boundary would be traced into the graph. (As a
        # decorator it would import the compiler along with this package.)
        self._call: Callable[..., None] = torch.compiler.disable(self._tell)  # type: ignore[no-untyped-call]

    def __call__(self, module: nn.Module, *args: Any) -> None:
        self._call(module)

    def _tell(self, module: nn.Module) -> None:
        target = self._target()
        if target is None:
            return
        if isinstance(module, DistributedDataParallel):
            target(module)
        else:
            target()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (logging.getLogger("commhooks.copies"), "debug")


class ParameterCheck:
    """Finds parameters that train but are not averaged, before a round leaves them out.

    Args:
        ddp: the model.
        averaged: the parameters that are.
    """

    def __init__(self, ddp: DistributedDataParallel, averaged: Iterable[Tensor]) -> None:
        ids = {id(parameter) for parameter in averaged}
        self._places = [
            (f"{prefix}.{key}" if prefix else key, module._parameters, key, parameter)
            for prefix, module in ddp.module.named_modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._places = [p for p in self._places if p[0] not in ddp.parameters_to_ignore]
        self._frozen = [(name, p) for name, _, _, p in self._places if id(p) not in ids]

    def __call__(self) -> str | None:
        """What is wrong, if anything is."""
        for name, where, key, parameter in self._places:
            if where.get(key) is not parameter:
                return (
                    f"parameter {name!r} has been replaced by another tensor since the model was "
                    "registered (load_state_dict(assign=True) does that), and DDP and the "
                    f"optimizer still have the old one. Load in place. {_ADVICE}"
                )
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                return (
                    f"parameter {name!r} requires a gradient now, but did not when the model was "
                    "wrapped in DistributedDataParallel, so neither DDP nor commhooks averages it. "
                    f"{_ADVICE}"
                )
        return None


_ADVICE = (
    "After such a change call state.finish() and state.close(), wrap the module in a new "
    "DistributedDataParallel and register a new state."
)


class _Registers(Protocol):
    def before_first_forward(self, model: DistributedDataParallel) -> None: ...


def when_forwarded(state: _Registers) -> None:
    """Tell ``state`` once before the first forward of a DDP model that it is the hook of.

    ``ddp_model.register_comm_hook(state, comm_hook)`` tells the state nothing. A hook on the
    forwards of all modules finds the model; it is taken away as soon as no state waits for its own.
    """
    global _handle
    # Another rank may wait in register() for this one, which never calls it.
    watch()
    _waiting.add(state)
    if _handle is None:
        _handle = register_module_forward_pre_hook(_look)


def no_longer(state: _Registers) -> None:
    """The state has found its model."""
    _waiting.discard(state)


_waiting: weakref.WeakSet[_Registers] = weakref.WeakSet()
_handle: RemovableHandle | None = None


def _has_hook(ddp: DistributedDataParallel) -> bool:
    facts: dict[str, object] = ddp._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    return bool(facts.get("comm_hook"))


def _look(module: nn.Module, args: Any) -> None:
    global _handle
    if not _waiting and _handle is not None:
        _handle.remove()
        _handle = None
        return
    ddp = unwrap_ddp(module)
    if ddp is None:
        return
    # The state may have been built before there was a process group.
    watch()
    for _, state in getattr(ddp, "_comm_hooks", ()):
        # A copy of a DDP model has a list of hooks, but no reducer that would call them.
        if state in _waiting and _has_hook(ddp):
            _waiting.discard(state)
            state.before_first_forward(ddp)
