"""The state machine behind every algorithm: what users register, evaluate with and checkpoint."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from commhooks.engine.agreement import agree
from commhooks.engine.checkpoint import FORMAT, check_identity
from commhooks.engine.communicator import done
from commhooks.engine.consensus import averageable_buffers
from commhooks.engine.engine import Engine
from commhooks.engine.registration import (
    check_group,
    check_model,
    check_optimizers,
    check_scaler,
    parameter_facts,
    require_process_group,
    synchronized_parameters,
)
from commhooks.engine.rules import Rules
from commhooks.engine.uneven import ShadowRounds
from commhooks.engine.watcher import GivenOptimizers, LearnedOptimizers, unwrap_ddp
from commhooks.errors import CheckpointError, HyperParameterError, RegistrationError
from commhooks.hook import comm_hook
from commhooks.hyperparameters import integer_at_least, positive_real
from commhooks.stats import Stats

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

__all__ = ["CommHookState", "EngineOptions"]

logger = logging.getLogger("commhooks")


class EngineOptions(TypedDict, total=False):
    """Keyword arguments that every algorithm hands to :class:`CommHookState`."""

    process_group: dist.ProcessGroup | None
    warmup_steps: int
    bucket_cap_mb: float


class CommHookState(Rules, Joinable):
    """A DDP communication hook state that averages parameters in place of gradients.

    Subclasses add the update rules of one algorithm (see :class:`commhooks.engine.rules.Rules`).
    A state is built from plain values; it takes hold of ranks and tensors when it is registered,
    and a copy or a pickle of it is a new, unregistered state with the same hyper-parameters.

    Args:
        process_group: ranks that train together; None means those of the DDP model.
        warmup_steps: steps during which gradients are averaged as in plain DDP, before the local
            steps begin (post-local SGD; Lin et al., ICLR 2020).
        bucket_cap_mb: size of an all-reduce's bucket, in MiB, counted in the format that
            parameters are averaged in.

    Raises:
        HyperParameterError: an argument has the wrong type or lies outside its range.
    """

    def __init__(
        self,
        *,
        process_group: dist.ProcessGroup | None = None,
        warmup_steps: int = 0,
        bucket_cap_mb: float = 25.0,
    ) -> None:
        super().__init__()
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise HyperParameterError(
                "process_group must be a torch.distributed.ProcessGroup or None, got "
                f"{process_group!r} of type {type(process_group).__name__}."
            )
        self.process_group = process_group
        self.warmup_steps = integer_at_least("warmup_steps", warmup_steps, 0)
        self.bucket_cap_mb = positive_real("bucket_cap_mb", bucket_cap_mb)
        self._engine: Engine | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._model: weakref.ref[DistributedDataParallel] | None = None
        self._watcher: object = None
        self._announcements: RemovableHandle | None = None
        self._seen: list[GradBucket] = []

    def hyperparameters(self) -> dict[str, object]:
        """The hyper-parameters as plain values, by the names the constructor takes."""
        return {"warmup_steps": self.warmup_steps}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.hyperparameters().items())
        return f"{type(self).__name__}({arguments})"

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            logger.warning("A process group cannot be copied or pickled; the copy has none.")
        hyperparameters = {
            name: value for name, value in self.__dict__.items() if name not in _RUNTIME
        }
        return {**hyperparameters, **_RUNTIME, "_seen": []}

    # Registration.

    def register(
        self,
        model: nn.Module,
        *optimizers: object,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Register this state as ``model``'s communication hook. Collective.

        DDP's broadcast of buffers at every forward is switched off: it is a blocking collective
        a step. Buffers stay local while training and are averaged in the consensus model.

        Args:
            model: a ``DistributedDataParallel``, compiled or not, as built or as
                ``accelerator.prepare`` returns it.
            *optimizers: all that update the model, as built or as ``accelerator.prepare`` returns
                them. A boundary runs right after the last of them has stepped.
            scaler: the loop's GradScaler, if it uses one, so that a step it skips counts too.
                Optimizers prepared by Accelerate bring theirs.

        Raises:
            RegistrationError: an argument or a checkpoint that was loaded before does not fit, or
                the ranks disagree on the algorithm, its hyper-parameters or the parameters. Raised
                on every rank; nothing has changed.
        """
        require_process_group()
        ddp = unwrap_ddp(model)
        refusal: str | None = None
        parameters: dict[str, Tensor] = {}
        unwrapped: list[Optimizer] = []
        try:
            self._refuse_second_registration()
            ddp = check_model(ddp, type(model))
            parameters = synchronized_parameters(ddp)
            unwrapped = check_optimizers(optimizers, list(parameters.values()))
            scaler = check_scaler(scaler, optimizers)
            check_group(self.process_group, ddp)
        except RegistrationError as error:
            refusal = str(error)
        group = self.process_group or (ddp.process_group if ddp else _world())
        facts = self._facts() | {"optimizers": len(optimizers)} | parameter_facts(parameters)
        agree(group, facts, refusal)
        assert ddp is not None
        engine = self._build_engine(group)
        engine.attach(parameters.values(), ddp)
        self._load_together(engine, "register")
        ddp.register_comm_hook(self, comm_hook)
        self._engine = engine
        self._watcher = GivenOptimizers(engine, ddp, unwrapped, scaler)
        self._adopt(ddp)

    def reduce_gradients(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """What :func:`commhooks.comm_hook` calls for every gradient bucket of a backward."""
        if bucket.buffer().is_sparse:
            raise RegistrationError(
                "A gradient is sparse, which a DDP communication hook cannot take; build the "
                "embedding with sparse=False."
            )
        if self._watcher is None:
            return self._learn(bucket)
        if isinstance(self._watcher, LearnedOptimizers) and bucket.is_last():
            self._watcher.check_parameters(bucket.parameters())
        assert self._engine is not None
        return self._engine.reduce_gradients(bucket)

    def _learn(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """The bare form's first backward: agree, collect the parameters, and only then reduce.

        The step may be one of a checkpoint, which cannot be loaded before the last bucket.
        """
        group = self.process_group or _world()
        if self._engine is None:
            agree(group, self._facts())
            self._engine = self._build_engine(group)
        self._seen.append(bucket)
        if not bucket.is_last():
            # DDP looks at no bucket before the last one's hook has returned.
            return done(bucket.buffer())
        buckets, self._seen = self._seen, []
        parameters = [parameter for each in buckets for parameter in each.parameters()]
        agree(group, parameter_facts({f"number {n}": p for n, p in enumerate(parameters)}))
        self._engine.attach(parameters)
        self._load_together(self._engine, "bare")
        self._watcher = LearnedOptimizers(self._engine, parameters, self._found)
        *others, last = [self._engine.reduce_gradients(each) for each in buckets]
        torch.futures.wait_all(others)
        return last

    def _found(self, ddp: DistributedDataParallel) -> None:
        check_group(self.process_group or _world(), ddp)
        self._adopt(ddp)

    def _adopt(self, ddp: DistributedDataParallel) -> None:
        # A strong reference would close a cycle through DDP's reducer, which no collector sees.
        self._model = weakref.ref(ddp)
        if ddp.forward_sync_buffers and any(True for _ in ddp.module.buffers()):
            logger.info(
                "commhooks: DDP no longer broadcasts buffers (such as BatchNorm's statistics) at "
                "every forward; averaged() and finish() average them."
            )
        ddp.forward_sync_buffers = False
        if ddp.find_unused_parameters:
            logger.warning(
                "commhooks: find_unused_parameters=True makes DDP all-reduce a bitmap at every "
                "step, which no hook can prevent; use static_graph=True where the graph allows."
            )

    def _build_engine(self, group: dist.ProcessGroup) -> Engine:
        return Engine(self, group, self.warmup_steps, self.bucket_cap_mb * 2**20)

    def _facts(self) -> dict[str, object]:
        return {
            "algorithm": type(self).__name__,
            **self.hyperparameters(),
            "bucket_cap_mb": self.bucket_cap_mb,
            "checkpoint to load": self._loaded is not None,
        }

    def _refuse_second_registration(self) -> None:
        if self._engine is not None:
            raise RegistrationError(
                "This state is registered already; build one state for every DDP model."
            )

    def _registered(self) -> Engine:
        if self._engine is None or self._watcher is None:
            raise RegistrationError(
                "This state is not registered yet; call state.register(ddp_model, optimizer), or "
                "run the first backward after ddp_model.register_comm_hook."
            )
        return self._engine

    # Use.

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the consensus model inside the block, and the rank's own outside. Collective.

        The consensus model is the mean over ranks of their parameters and floating-point buffers.
        What a rank had is put back bit for bit, after an exception too; the trajectory of training
        is the one it would be without the block. Blocks may be nested.

        Its place is after the optimizer's step. Between a backward and its step, a boundary that is
        due runs before the block, on the parameters as they are before the step.

        Raises:
            RoundError: a round failed, or the averaging did; the models are as they were.
            RegistrationError: not registered yet; or a backward runs inside the block. That one
                is no step; if the error is caught, training can go on once its gradients are
                cleared.
        """
        engine = self._registered()
        entered = engine.enter_consensus(self._buffers())
        try:
            yield
        finally:
            if entered:
                engine.leave_consensus()

    def finish(self) -> None:
        """Drain what is in flight and end on the consensus model, on every rank. Collective.

        If training goes on, the algorithm begins anew: the anchor is the consensus model, and
        boundaries are counted from here.

        Raises:
            RoundError: a round failed, or the averaging did; the models are as they were.
            RegistrationError: not registered yet, or inside ``averaged()``.
        """
        self._registered().finish(self._buffers())

    def disable(self) -> None:
        """Average gradients as plain DDP does, from the next step on. Collective.

        DDP's hooks cannot be removed. Ends on the consensus model first, like :meth:`finish`,
        since gradient averaging alone would never bring the ranks' models together again. An
        optimizer's state stays what it is: momentum gathered locally still differs between ranks.
        """
        self.finish()
        self._registered().disable()

    # Ranks with different numbers of batches: `with Join([state, ddp_model]):`.

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """What ``torch.distributed.algorithms.Join`` runs on a rank that is out of batches.

        The rank shadows the others' rounds with its last parameters; at the end of the context
        all ranks finish together. The state comes first: ``Join([state, ddp_model])``. Batches
        should not run out during warm-up, where the rank would miss the others' updates.

        Raises:
            RegistrationError: not registered yet.
        """
        self._registered()
        model = self._model() if self._model is not None else None
        if model is None:
            raise RegistrationError(
                "Join needs a model registered with state.register(ddp_model, optimizer)."
            )
        if self._announcements is not None:
            # Of a context that an exception has left.
            self._announcements.remove()
        hook: Callable[..., None] = torch.compiler.disable(self._announce_step)  # type: ignore[no-untyped-call]
        self._announcements = model.register_forward_pre_hook(hook)
        return ShadowRounds(self)

    @property
    def join_device(self) -> torch.device:
        """Where Join's counters lie."""
        return self._registered().device

    @property
    def join_process_group(self) -> dist.ProcessGroup:
        """The ranks that Join counts."""
        return self._registered().communicator.parent

    def shadow_step(self) -> None:
        """Take part in a step of the ranks that still have batches; called by Join."""
        self._registered().shadow_step()

    def end_shadowing(self) -> None:
        """Finish with the others at the end of a Join context; called by Join."""
        if self._announcements is not None:
            self._announcements.remove()
        self._registered().end_shadowing()
        self.finish()

    def _announce_step(self, model: DistributedDataParallel, args: object) -> None:
        """Tell the ranks that are out of batches that a step begins, as DDP itself would."""
        if not (torch.is_grad_enabled() and model.require_backward_grad_sync):
            return
        if self._join_config.enable and not self._join_config.is_first_joinable:
            raise RegistrationError(
                "The state must come first, Join([state, ddp_model]), so that its rounds are "
                "shadowed before DDP's hook is called."
            )
        Join.notify_join_context(self)

    @property
    def stats(self) -> Stats:
        """A snapshot of what this rank has sent, waited for and hidden; zeros before a start."""
        return self._engine.stats() if self._engine is not None else Stats()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of what it takes to go on bit for bit: tensors and plain values.

        Waits for the round in flight, which changes nothing of the trajectory. Save it along with
        the rank's own parameters and optimizer state, after the optimizer's step, since gradients
        are no part of it; a boundary that is due for want of a step runs now.

        Raises:
            RoundError: a round failed.
            RegistrationError: not registered yet.
        """
        engine = self._registered()
        return {"format": FORMAT} | self._identity(engine, self._form) | engine.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; the parameters are the caller's to load.

        Before the parameters are known (before ``register``; in the bare form before the first
        backward), the values are kept until then. On another number of ranks than saved, load the
        consensus model and any rank's dictionary on all of them; what had to be reset is logged.

        Raises:
            CheckpointError: another format, algorithm, hyper-parameter, rank or shape. Nothing has
                changed. Of values that were kept, RegistrationError says so on every rank.
        """
        mine = {"algorithm": type(self).__name__, "hyperparameters": self.hyperparameters()}
        check_identity(state_dict, mine)
        if self._watcher is None:
            self._loaded = state_dict
        else:
            self._load(state_dict, self._registered(), self._form)

    @property
    def model(self) -> DistributedDataParallel | None:
        """The registered model; None before it is known."""
        return self._model() if self._model is not None else None

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raise what :meth:`load_state_dict` would raise, and change nothing.

        Raises:
            CheckpointError: as :meth:`load_state_dict`.
        """
        mine = {"algorithm": type(self).__name__, "hyperparameters": self.hyperparameters()}
        check_identity(state_dict, mine)

    def close(self) -> None:
        """End the registration. Collective, after :meth:`finish`."""
        self.finish()

    def _load_together(self, engine: Engine, form: str) -> None:
        """Load what was kept; refused on every rank if it does not fit on one. Collective."""
        if self._loaded is None:
            return
        problem = None
        try:
            self._load(self._loaded, engine, form)
        except CheckpointError as error:
            problem = str(error)
        agree(engine.communicator.parent, {}, problem)
        self._loaded = None

    def _load(self, loaded: Mapping[str, Any], engine: Engine, form: str) -> None:
        mine = self._identity(engine, form)
        same_ranks = loaded.get("world_size") == mine["world_size"]
        if not same_ranks:
            # Any rank's vectors will do, or none.
            mine = {k: v for k, v in mine.items() if k not in ("world_size", "rank")}
        check_identity(loaded, mine)
        kept = engine.load_state_dict(loaded, same_ranks=same_ranks)
        if not same_ranks:
            logger.warning(
                "commhooks: the checkpoint is of %s ranks, this run has %s; load the consensus "
                "model on every rank. %s",
                loaded.get("world_size"),
                engine.communicator.size,
                "The anchor goes on."
                if kept
                else "The algorithm's vectors were reset: it starts anew from the parameters.",
            )

    def _identity(self, engine: Engine, form: str) -> dict[str, Any]:
        return {
            "algorithm": type(self).__name__,
            "hyperparameters": self.hyperparameters(),
            "world_size": engine.communicator.size,
            "rank": engine.communicator.rank,
            "form": form,
        }

    @property
    def _form(self) -> str:
        """How the state was registered; the two forms know the parameters in different orders."""
        return "bare" if isinstance(self._watcher, LearnedOptimizers) else "register"

    def _buffers(self) -> list[Tensor]:
        model = self._model() if self._model is not None else None
        return averageable_buffers(model) if model is not None else []


# What a copy or a pickle starts without.
_RUNTIME: dict[str, object] = {
    "process_group": None,
    "_engine": None,
    "_loaded": None,
    "_model": None,
    "_watcher": None,
    "_announcements": None,
}


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world
