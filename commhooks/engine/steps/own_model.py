"""Notices who reads or runs a rank's own model past the DDP model around it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from commhooks.engine.steps.model import Hook

__all__ = ["OwnModelWatch"]


class OwnModelWatch:
    """Calls back when a module is evaluated directly, and when its parameters are read.

    Args:
        module: the one within the DDP model, which scripts call and save on one rank.
        evaluated: called before a forward without gradients of the module in evaluation mode, while
            :meth:`look` says so.
        read: called before ``state_dict()``, of the DDP model too, and before a copy or a pickle.
    """

    def __init__(
        self, module: nn.Module, evaluated: Callable[[], None], read: Callable[[], None]
    ) -> None:
        self._module = weakref.ref(module)
        self._evaluated = weakref.WeakMethod(evaluated)
        hook = _ReadHook(read)
        self._reads: RemovableHandle = module.register_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
        self._forwards: RemovableHandle | None = None

    def look(self, now: bool) -> None:
        """Look at forwards from now on, or no longer.

        Not while DDP calls the module, where a hook would cost time at every step and be a part of
        compiled graphs; and not once the ranks have one model, for ``torch.jit.script`` takes no
        module with hooks that are not made for it.
        """
        if self._forwards is not None and not now:
            self._forwards.remove()
            self._forwards = None
        elif self._forwards is None and now and (module := self._module()) is not None:
            self._forwards = module.register_forward_pre_hook(Hook(self._before_forward))

    def close(self) -> None:
        """Call back no longer."""
        self.look(False)
        self._reads.remove()

    def _before_forward(self) -> None:
        module, evaluated = self._module(), self._evaluated()
        if module is None or evaluated is None:
            return
        if not (module.training or torch.is_grad_enabled()):
            evaluated()


class _ReadHook(Hook):
    """One that is also told of copies and pickles, of which it is a part."""

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        # Who wants the parameters themselves looks at them, and does not save them.
        if not keep_vars:
            super().__call__(module)

    def __reduce__(self) -> tuple[Any, ...]:
        if (target := self._target()) is not None:
            target()
        return super().__reduce__()
