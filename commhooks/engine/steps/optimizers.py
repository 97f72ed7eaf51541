"""Where a state is called from: optimizers, GradScaler and the model's forward."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from commhooks.errors import RegistrationError

__all__ = ["GivenOptimizers", "LearnedOptimizers", "Watched", "owns", "unwrap_ddp"]


class Watched(Protocol):
    """What a watcher tells its state."""

    @property
    def boundary_due(self) -> bool:
        """Whether a boundary waits for the optimizers."""

    def at_boundary(self) -> None:
        """Every optimizer has stepped, or been skipped, since the backward; a boundary is due."""


def owns(optimizer: Optimizer, parameters: Iterable[Tensor]) -> bool:
    """Whether ``optimizer`` updates any of ``parameters``."""
    ids = {id(parameter) for parameter in parameters}
    return any(id(p) in ids for group in optimizer.param_groups for p in group["params"])


def unwrap_ddp(module: object) -> DistributedDataParallel | None:
    """The DDP model in ``module``, which may be a compiled one; None if there is none."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, DistributedDataParallel) else None


class _Watcher:
    """Runs a due boundary once all optimizers have stepped, or else before the next forward.

    The forward is the backstop for a loop whose GradScaler the state does not know: a step that
    it skips fires no hook. Nothing writes parameters between the two moments.
    """

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._stepped: set[int] = set()

    def watch_forward(self, model: DistributedDataParallel) -> None:
        # Compiled, the hook's futures and collectives would be traced into the graph.
        hook: Callable[..., None] = torch.compiler.disable(self._before_forward)  # type: ignore[no-untyped-call]
        model.register_forward_pre_hook(hook)

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        # One without gradients is an evaluation, perhaps between a backward and its step.
        if torch.is_grad_enabled() and self._watched.boundary_due:
            self._run()

    def _after_step(self, optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> None:
        if self._watched.boundary_due:
            self._stepped.add(id(optimizer))
            if self._all_stepped():
                self._run()

    def _all_stepped(self) -> bool:
        raise NotImplementedError

    def _run(self) -> None:
        self._stepped.clear()
        self._watched.at_boundary()


class GivenOptimizers(_Watcher):
    """Watches the optimizers, the scaler and the model that ``register`` was given."""

    def __init__(
        self,
        watched: Watched,
        model: DistributedDataParallel,
        optimizers: Iterable[Optimizer],
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        super().__init__(watched)
        self._ids: set[int] = set()
        # An optimizer and a scaler outlive the model that is wrapped anew.
        after_step = weakref.WeakMethod(self._after_step)

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if (alive := after_step()) is not None:
                alive(optimizer)

        for optimizer in optimizers:
            self._ids.add(id(optimizer))
            optimizer.register_step_post_hook(after)
        if scaler is not None:
            self._watch_scaler(scaler)
        self.watch_forward(model)

    def _all_stepped(self) -> bool:
        return self._stepped >= self._ids

    def _watch_scaler(self, scaler: torch.amp.GradScaler) -> None:
        """Let a step that the scaler skips count like one that was made.

        An optimizer whose step is skipped fires no hook, and GradScaler has none to offer, so its
        bound method is wrapped on this one instance.
        """
        step = scaler.step
        me = weakref.ref(self)

        @functools.wraps(step)
        def watched_step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
            result = step(optimizer, *args, **kwargs)
            inner = getattr(optimizer, "optimizer", optimizer)
            watcher = me()
            if watcher is not None and id(inner) in watcher._ids:
                watcher._after_step(inner)
            return result

        scaler.step = watched_step  # type: ignore[method-assign]


class LearnedOptimizers(_Watcher):
    """Learns the optimizers as they step and the model at its next forward (the bare form).

    Until then a boundary waits for optimizers that own every parameter, so that the first of two
    optimizers does not pass for the only one.
    """

    def __init__(
        self,
        watched: Watched,
        parameters: Iterable[Tensor],
        found: Callable[[DistributedDataParallel], None],
    ) -> None:
        super().__init__(watched)
        self._parameters = {id(parameter) for parameter in parameters}
        self._unowned: set[int] | None = set(self._parameters)
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._found = found
        _learners.add(self)
        _watch_all_optimizers()
        me = weakref.ref(self)

        def look(module: nn.Module, args: Any) -> None:
            learner = me()
            if learner is None:
                looking.remove()
            elif (model := learner.recognise(module)) is not None:
                looking.remove()
                learner.learn(model, args)

        looking = register_module_forward_pre_hook(look)

    def recognise(self, module: nn.Module) -> DistributedDataParallel | None:
        """The DDP model in ``module``, if it is the one whose buckets were seen."""
        model = unwrap_ddp(module)
        if model is not None and any(id(p) in self._parameters for p in model.parameters()):
            return model
        return None

    def check_parameters(self, parameters: Iterable[Tensor]) -> None:
        """Refuse the buckets of a second model.

        Raises:
            RegistrationError: these are not parameters that were seen in the first backward.
        """
        if any(id(parameter) not in self._parameters for parameter in parameters):
            raise RegistrationError(
                "This state is the hook of another DDP model already; build one state for every "
                "DDP model."
            )

    def learn(self, model: DistributedDataParallel, args: Any) -> None:
        """Take over ``model``, which is about to run."""
        self._unowned = None
        self.watch_forward(model)
        self._found(model)
        # This forward may have begun already, so its own hooks are too late for a due boundary.
        self._before_forward(model, args)

    def _after_step(self, optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> None:
        if self._is_known(optimizer):
            super()._after_step(optimizer, args, kwargs)

    def _is_known(self, optimizer: Optimizer) -> bool:
        if optimizer in self._known:
            return True
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if owned.isdisjoint(self._parameters):
            return False
        self._known.add(optimizer)
        if self._unowned is not None:
            self._unowned -= owned
        return True

    def _all_stepped(self) -> bool:
        return not self._unowned and self._stepped >= {id(known) for known in self._known}


# torch keeps global hooks for ever and cannot lose one while it runs them, so there is one for all
# states of the bare form, and it keeps none of them alive.
_learners: weakref.WeakSet[LearnedOptimizers] = weakref.WeakSet()


@functools.cache
def _watch_all_optimizers() -> None:
    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for learner in tuple(_learners):
            learner._after_step(optimizer, args, kwargs)

    register_optimizer_step_post_hook(after)
