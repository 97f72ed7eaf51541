"""When all optimizers have stepped, so that a boundary can run: optimizers, GradScaler, forward."""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from commhooks.engine.steps.kept_weights import CopySearch, check_optimizer
from commhooks.engine.steps.shared_updates import SharedUpdates
from commhooks.engine.steps.writes import Writes

__all__ = ["OptimizerWatch", "owned", "unwrapped"]

logger = logging.getLogger("commhooks")


class Watched(Protocol):
    """What is told that a boundary can run."""

    updates: SharedUpdates

    @property
    def step(self) -> int:
        """Steps so far."""

    @property
    def counted(self) -> int:
        """Steps that were counted, whatever a checkpoint says of others."""

    @property
    def boundary_due(self) -> bool:
        """Whether a boundary waits for the optimizers."""

    def pass_by(self) -> None:
        """The training thread passes."""

    @property
    def averages_gradients(self) -> bool:
        """Whether the step under way averages gradients."""

    @property
    def writes(self) -> Writes:
        """Who writes to the parameters."""

    def look_for_writes(self) -> None:
        """An optimizer is about to update the model; whatever has been written was not by it."""

    def updated_unseen(self) -> None:
        """An optimizer has updated the model, and no backward was counted for it."""

    def at_boundary(self) -> None:
        """Every optimizer has stepped, or been skipped, since the backward; a boundary is due."""


def unwrapped(optimizer: object) -> object:
    """The optimizer in Accelerate's or Lightning's wrapper, which only forwards what it is asked.

    Other wrappers (Lookahead, say) do something to the weights themselves.
    """
    package = type(optimizer).__module__.partition(".")[0]
    if package in ("accelerate", "lightning", "pytorch_lightning", "lightning_fabric"):
        return getattr(optimizer, "optimizer", optimizer)
    return optimizer


def owned(optimizer: Optimizer, parameters: Mapping[int, Tensor]) -> list[Tensor]:
    """Those of ``parameters`` (by ``id``) that ``optimizer`` updates."""
    mine = (p for group in optimizer.param_groups for p in group["params"])
    return [p for p in mine if id(p) in parameters]


def _key(optimizer: Optimizer, parameters: Iterable[int]) -> tuple[object, ...]:
    """What an optimizer is, and which of the parameters, by their ids, it updates."""
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    numbers = (number for number, key in enumerate(parameters) if key in mine)
    return (type(optimizer).__qualname__, *numbers)


class OptimizerWatch:
    """Runs a due boundary once all optimizers have stepped, or else before the next forward.

    The forward is the backstop for whatever steps unseen: a GradScaler that the state does not know
    skips a step, which fires no hook. Nothing writes parameters between the two moments.

    Args:
        watched: whose boundaries they are.
        parameters: those that are averaged.
        optimizers: all that update them; in the bare form none, and they are learnt as they step.
        scaler: the loop's GradScaler.

    Attributes:
        stepping_for_scaler: whether the scaler is about to step or skip, and will tell of both.
    """

    stepping_for_scaler = False
    _looks_for_copies = True

    def __init__(
        self,
        watched: Watched,
        parameters: Iterable[Tensor],
        optimizers: Sequence[Optimizer] = (),
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._watched = watched
        self._parameters = {id(parameter): parameter for parameter in parameters}
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet(optimizers)
        self._given = bool(optimizers)
        # A boundary waits until so many have had an owner that stepped, lest the first of several
        # new optimizers pass for the only one.
        self._updated = self._ids_of(optimizers) if optimizers else set(self._parameters)
        self._stepped: set[int] = set()
        self._stepped_in = 0
        # Of optimizers that another rank has and this one has not seen yet.
        self._unclaimed: dict[Any, dict[str, Any]] = {}
        self._copies = CopySearch()
        self._began = watched.counted
        self._updated_in: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._told_unseen = False
        self._looked_in = -1
        self._scaler: weakref.ref[torch.amp.GradScaler] | None = None
        if scaler is not None:
            self._scaler = weakref.ref(scaler)
            scaler.step = _WatchedStep(scaler, self)  # type: ignore[method-assign]
        _watches.add(self)
        _watch_all_optimizers()

    def close(self) -> None:
        """Watch no longer."""
        _watches.discard(self)
        scaler = self._scaler() if self._scaler is not None else None
        step = scaler.__dict__.get("step") if scaler is not None else None
        if scaler is not None and isinstance(step, _WatchedStep) and step.watch() is self:
            scaler.step = step.plain  # type: ignore[method-assign]

    def rates(self) -> dict[int, float]:
        """The learning rates in force, by the ``id`` of the parameters."""
        return {
            id(p): float(group["lr"])
            for optimizer in self._known
            for group in optimizer.param_groups
            for p in group["params"]
            if "lr" in group
        }

    def states(self) -> dict[str, Any]:
        """The states of the optimizers and of the scaler, as another rank takes them."""
        scaler = self._scaler() if self._scaler is not None else None
        return {
            "optimizers": {_key(each, self._parameters): each.state_dict() for each in self._known},
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def load_states(self, states: Mapping[str, Any]) -> None:
        """Go on from another rank's; an optimizer that has not stepped yet does when it will."""
        scaler = self._scaler() if self._scaler is not None else None
        if scaler is not None and states["scaler"] is not None:
            scaler.load_state_dict(states["scaler"])
        self._unclaimed = dict(states["optimizers"])
        for optimizer in tuple(self._known):
            self._claim(optimizer)

    def _claim(self, optimizer: Optimizer) -> None:
        state = self._unclaimed.pop(_key(optimizer, self._parameters), None)
        if state is not None:
            optimizer.load_state_dict(state)

    def before_forward(self) -> None:
        """A forward of the model begins, which may be an evaluation before an optimizer's step."""
        if torch.is_grad_enabled() and self._watched.boundary_due:
            self._run()

    def after_step(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped, or its step was skipped.

        Raises:
            RegistrationError: it keeps copies of the weights, which would undo every average; or it
                shares its updates between workers.
        """
        if not self._is_mine(optimizer):
            return
        self._watched.pass_by()
        self._watched.updates.after(optimizer, lambda: owned(optimizer, self._parameters))
        self._copies.after_step(optimizer)
        if self._stepped_in != self._watched.step:
            # Steps made for an earlier backward do not count for this one.
            self._stepped_in = self._watched.step
            self._stepped.clear()
        self._stepped.add(id(optimizer))
        if self._is_awaited() and self._all_stepped():
            self.settled()

    def updated(self, optimizer: Optimizer) -> None:
        """An optimizer has updated its parameters, which a skipped step does not."""
        mine = owned(optimizer, self._parameters)
        if not any(p.grad is not None for p in mine):
            return
        step = self._watched.counted
        in_backward = torch._C._current_graph_task_id() != -1
        # The backward that the very first step is part of is yet to be counted.
        before = self._updated_in.get(optimizer, -1 if in_backward else self._began)
        self._updated_in[optimizer] = step
        # A step at a learning rate of 0 makes an optimizer's state, and moves nothing.
        unseen = step == before and self._watched.writes.changed
        self._watched.writes.settle(mine)
        if unseen:
            self._tell_unseen(
                "has updated the model, and no backward of the DDP model was counted for it, so "
                "that nothing is averaged: call ddp_model(x) and not ddp_model.module(x), "
                "loss.backward() and not torch.autograd.grad, and the last backward before a step "
                "outside no_sync(). If that is so, torch has dropped DDP's hooks, as it does when "
                "a model's dtype or device changes: wrap the module anew, and register a new state",
                optimizer,
            )
        elif in_backward and self._watched.averages_gradients:
            self._tell_unseen(
                "steps inside the backward, before its gradients are averaged: let it step behind "
                "the backward, or take warmup_steps=0",
                optimizer,
            )

    def _tell_unseen(self, what: str, optimizer: Optimizer) -> None:
        self._watched.updated_unseen()
        if not self._told_unseen:
            logger.warning(
                "commhooks: %s %s. averaged() and finish() average what the ranks have.",
                type(optimizer).__name__,
                what,
            )
        self._told_unseen = True

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer is about to step."""
        if not self._updates(optimizer):
            return
        if self._looked_in != self._watched.counted:
            # Before the first optimizer of a step; the others come behind what that one writes.
            self._looked_in = self._watched.counted
            self._watched.look_for_writes()
        self._watched.updates.before(optimizer, lambda: owned(optimizer, self._parameters))
        if self._unclaimed:
            self._claim(optimizer)
        if self._looks_for_copies and self._copies.goes_on(optimizer):
            self._copies.before_step(optimizer, owned(optimizer, self._parameters))

    def _updates(self, optimizer: Optimizer) -> bool:
        """Whether it is the model's: another model's may step on another thread."""
        return optimizer in self._known or any(
            id(p) in self._parameters for group in optimizer.param_groups for p in group["params"]
        )

    def _is_awaited(self) -> bool:
        """Whether it matters that all optimizers have stepped."""
        return self._watched.boundary_due

    def settled(self) -> None:
        """All optimizers have stepped."""
        self._run()

    def _is_mine(self, optimizer: Optimizer) -> bool:
        if optimizer in self._known:
            return True
        # An optimizer may be given parameters later.
        mine = owned(optimizer, self._parameters)
        if not mine:
            return False
        check_optimizer(optimizer)
        if self._given:
            logger.warning(
                "commhooks: a %s updates parameters of the model and was not given to "
                "state.register. From now on a boundary waits for it, too.",
                type(optimizer).__name__,
            )
        self._known.add(optimizer)
        return True

    def _all_stepped(self) -> bool:
        known = list(self._known)
        return self._stepped >= {id(optimizer) for optimizer in known} and (
            self._ids_of(known) >= self._updated
        )

    def _ids_of(self, optimizers: Iterable[Optimizer]) -> set[int]:
        return {id(p) for each in optimizers for p in owned(each, self._parameters)}

    def _run(self) -> None:
        self._stepped.clear()
        self._watched.at_boundary()


class _WatchedStep:
    """``scaler.step`` that tells of a step whether the scaler skips it or not.

    An optimizer whose step is skipped fires no hook, and GradScaler has none to offer, so the bound
    method is replaced on this one instance. A copy or a pickle of the scaler has a plain one.
    """

    def __init__(self, scaler: torch.amp.GradScaler, watch: OptimizerWatch) -> None:
        self._scaler = scaler
        self.watch = weakref.ref(watch)
        self.plain: Callable[..., float | None] = scaler.step
        # Of a state that is gone.
        while isinstance(self.plain, _WatchedStep) and self.plain.watch() is None:
            self.plain = self.plain.plain

    def __call__(self, optimizer: Any, *args: Any, **kwargs: Any) -> float | None:
        watch, inner = self.watch(), unwrapped(optimizer)
        if watch is None or not isinstance(inner, Optimizer):
            return self.plain(optimizer, *args, **kwargs)
        watch.stepping_for_scaler = True
        try:
            result = self.plain(optimizer, *args, **kwargs)
        finally:
            watch.stepping_for_scaler = False
        watch.after_step(inner)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        # Asked of the copy, which has no such attribute of its own yet.
        return getattr, (self._scaler, "step")


# torch keeps global hooks for ever and cannot lose one while it runs them, so there is one for all
# states, and it keeps none of them alive.
_watches: weakref.WeakSet[OptimizerWatch] = weakref.WeakSet()


@functools.cache
def _watch_all_optimizers() -> None:
    # Compiled, an optimizer's step would have the engine traced into its graph.
    announce: Callable[..., None] = torch.compiler.disable(_announce)  # type: ignore[no-untyped-call]
    tell: Callable[..., None] = torch.compiler.disable(_tell)  # type: ignore[no-untyped-call]
    register_optimizer_step_pre_hook(announce)
    register_optimizer_step_post_hook(tell)


def _announce(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for watch in tuple(_watches):
        watch.before_step(optimizer, args, kwargs)


def _tell(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _watches and not _inside_another_step():
        for watch in tuple(_watches):
            watch.updated(optimizer)
            watch.after_step(optimizer)


def _inside_another_step() -> bool:
    """Whether the step that has just ended is part of another one, which is not over.

    torch fires the hooks for ``super().step()`` in a subclass's ``step``, too, and for the inner
    optimizer of a wrapper. Both may still write to the weights. Every step that fires hooks runs in
    the same function of torch's, so it is looked for among the callers.
    """
    steps = 0
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and steps < 2:
        steps += caller.f_code is _STEP
        caller = caller.f_back
    return steps > 1


_STEP = Optimizer.profile_hook_step(_tell).__code__
