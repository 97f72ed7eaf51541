"""What a state watches on the model itself: its forwards, and what is done to its parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from commhooks.engine.guards.training_thread import TrainingThread
from commhooks.engine.network.waiting import watch
from commhooks.engine.steps.reducers import hooks_of_replicate

__all__ = [
    "Hook",
    "ModelWatch",
    "ParameterCheck",
    "has_hook",
    "unwrap_ddp",
    "unwrapped_model",
    "when_forwarded",
]

# Where Lightning Fabric and torch.compile keep what they wrap. Fabric's wrapper has also all
# attributes of the module within the DDP model, and so it is asked for its own one first.
_INSIDE = ("_forward_module", "_orig_mod")


def unwrapped_model(model: object) -> object:
    """The model in what torch.compile and Fabric's ``setup`` have put around it."""
    while not isinstance(model, DistributedDataParallel):
        inside = (getattr(model, name, None) for name in _INSIDE)
        inner = next((each for each in inside if isinstance(each, nn.Module)), None)
        if inner is None:
            break
        model = inner
    return model


def unwrap_ddp(module: object) -> DistributedDataParallel | None:
    """The DDP model in ``module``, which may be a compiled one; None if there is none."""
    inner = unwrapped_model(module)
    return inner if isinstance(inner, DistributedDataParallel) else None


class ModelWatch:
    """Calls back before every forward of a model, and before ``load_state_dict`` on it.

    Args:
        model: the model.
        before_forward: called before a forward; with the model, if that is a DDP model.
        before_load: called before parameters are loaded; it may raise to forbid it.
        gone: called when the model is gone, for it can make no more steps.
    """

    def __init__(
        self,
        model: nn.Module,
        before_forward: Callable[..., None],
        before_load: Callable[[], None],
        gone: Callable[[], None],
    ) -> None:
        # Of the module within, since that one may be loaded, too.
        module = model.module if isinstance(model, DistributedDataParallel) else model
        self._handles: list[RemovableHandle] = [
            module.register_load_state_dict_pre_hook(Hook(before_load)),
            model.register_forward_pre_hook(Hook(before_forward)),
        ]
        self._end = weakref.finalize(model, _call, weakref.WeakMethod(gone))
        self._end.atexit = False

    def close(self) -> None:
        """Call back no longer."""
        self._end.detach()
        for handle in self._handles:
            handle.remove()


def _call(target: weakref.WeakMethod[Callable[[], None]]) -> None:
    if (alive := target()) is not None:
        alive()


class Hook:
    """A module's hook that keeps its target alive no longer than others do.

    A copy or a pickle of the module has one in its place that does nothing, and whose pickle loads
    where this package is not installed: a method of Python's own that takes anything.
    """

    def __init__(self, target: Callable[..., None]) -> None:
        self._target = weakref.WeakMethod(target)
        # Compiled, the futures and collectives of a boundary would be traced into the graph. (As a
        # decorator it would import the compiler along with this package.)
        self._call: Callable[..., None] = torch.compiler.disable(self._tell)  # type: ignore[no-untyped-call]

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Torch calls every kind of hook with the module, and some with more."""
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
        return getattr, (nullcontext(), "__exit__")


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
    def before_first_forward(self, model: nn.Module) -> None: ...


def when_forwarded(state: _Registers) -> None:
    """Tell ``state`` once before the first forward of a DDP model that it is the hook of.

    ``ddp_model.register_comm_hook(state, comm_hook)`` tells the state nothing. A hook on the
    forwards of all modules finds the model; it is taken away as soon as no state waits for its own.
    """
    global _handle
    # Another rank may wait in register() for this one, which never calls it.
    watch()
    _waiting[state] = TrainingThread()
    if _handle is None:
        _handle = register_module_forward_pre_hook(_look)


def no_longer(state: _Registers) -> None:
    """The state has found its model."""
    _waiting.pop(state, None)


# The thread that has built a state is taken for the one that trains.
_waiting: weakref.WeakKeyDictionary[_Registers, TrainingThread] = weakref.WeakKeyDictionary()
_handle: RemovableHandle | None = None


def has_hook(ddp: DistributedDataParallel) -> bool:
    """Whether DDP's reducer has a communication hook, of Python or built in."""
    facts: dict[str, object] = ddp._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    return bool(facts.get("comm_hook"))


def _look(module: nn.Module, args: Any) -> None:
    global _handle
    handle = _handle
    if not _waiting and handle is not None:
        handle.remove()
        _handle = None
        return
    ddp = unwrap_ddp(module)
    hooked = {id(each) for each in hooks_of_replicate(module)}
    if ddp is not None:
        hooked = {id(state) for _, state in getattr(ddp, "_comm_hooks", ())}
    if not hooked:
        return
    # The state may have been built before there was a process group.
    watch()
    for state, thread in list(_waiting.items()):
        # A copy of a DDP model has a list of hooks, but no reducer that would call them.
        if id(state) not in hooked or (ddp is not None and not has_hook(ddp)):
            continue
        # An evaluation on another thread is not where the ranks meet.
        if thread.is_this or torch.is_grad_enabled():
            no_longer(state)
            state.before_first_forward(module)
