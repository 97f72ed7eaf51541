"""The state machine behind every algorithm: what users register, evaluate with and checkpoint."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from commhooks.drift import DriftTable
from commhooks.engine.checkpoint import FORMAT, check_identity
from commhooks.engine.engine import Engine
from commhooks.engine.guards.interrupts import uninterrupted
from commhooks.engine.guards.refused_backward import raise_after_backward
from commhooks.engine.network.agreement import agree
from commhooks.engine.network.codecs import CODECS
from commhooks.engine.network.communicator import done
from commhooks.engine.network.islands import island_of, settle_layout, workers_of
from commhooks.engine.rules import Rules
from commhooks.engine.steps.claims import claim, refuse_claimed, release
from commhooks.engine.steps.model import (
    ModelWatch,
    ParameterCheck,
    no_longer,
    unwrap_ddp,
    when_forwarded,
)
from commhooks.engine.steps.optimizers import OptimizerWatch
from commhooks.engine.steps.outside import compare_outside
from commhooks.engine.steps.reducers import refuse_optimizers_in_backward
from commhooks.engine.steps.registration import (
    check_group,
    check_model,
    check_optimizers,
    check_pruning,
    check_scaler,
    parameter_facts,
    refuse_unknown,
    require_known_groups,
    require_process_group,
    synchronized_parameters,
    trainable,
)
from commhooks.engine.steps.sharded import (
    ShardCheck,
    ShardedWatch,
    as_sharded,
    check_sharded,
    local_shard,
    meet,
)
from commhooks.engine.steps.uneven import ShadowRounds
from commhooks.engine.vectors.buffers import check_patterns, find_buffers
from commhooks.engine.vectors.fragments import partition
from commhooks.engine.vectors.frozen import Held, find_frozen
from commhooks.engine.vectors.spectral import find_spectral
from commhooks.errors import CheckpointError, HyperParameterError, RegistrationError
from commhooks.hook import comm_hook
from commhooks.hyperparameters import (
    Count,
    IslandRanks,
    Names,
    Positive,
    checked_fields,
    one_of,
    plain,
    refusal,
)
from commhooks.periods import chosen, hides
from commhooks.stats import Stats

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket
    from torch.distributed.fsdp import FSDPModule

__all__ = ["CommHookState"]

logger = logging.getLogger("commhooks")

# A learning rate is seldom known more closely.
_NOTABLE = math.log(1.3)

_NO_HYPERPARAMETERS = ("process_group", "bucket_cap_mb", "average_buffers", "island")


@dataclass(eq=False, repr=False)
class CommHookState(Rules, Joinable):
    """A DDP communication hook state that averages parameters in place of gradients.

    Subclasses are dataclasses whose fields are the hyper-parameters of one algorithm, and add its
    update rules (see :class:`commhooks.engine.rules.Rules`). A state is built from plain values; it
    takes hold of ranks and tensors when it is registered, and a copy or a pickle of it is a new,
    unregistered state with the same hyper-parameters.

    Args:
        process_group: ranks that train together; None means those of the DDP model.
        warmup_steps: steps during which gradients are averaged as in plain DDP, before the local
            steps begin (post-local SGD; Lin et al., ICLR 2020).
        bucket_cap_mb: size of an all-reduce's bucket, in MiB, counted in the format that
            parameters are averaged in. Compressed rounds have buckets of an eighth of it, so that
            the second shots of some are in flight along with the first ones of others.
        average_buffers: names, as in ``module.named_buffers()``, or shell patterns of names of
            buffers that are averaged in the consensus model, besides the running mean and variance
            of normalisation layers. All others are the first rank's there.
        island: ranks that average their gradients at every step, over their fast bus, and so make
            one worker: ``"node"`` for the ranks of a machine, as torchrun and ``accelerate launch``
            count them in LOCAL_WORLD_SIZE; a number of neighbouring ranks; or this rank's island as
            a process group. None makes every rank a worker. Each rank averages its share of the
            parameters with the ranks at its place in the other islands.
        compression: what a round sends: "bf16", "int8" or "int4", a half, a quarter or an eighth of
            the bytes; None sends fp32. It is a difference to the last mean that is rounded, with a
            scale for every 256 numbers, and what is rounded off is sent in later rounds. Takes 2 to
            4 models of memory more (``docs/slow-links.md`` counts them).

    Raises:
        HyperParameterError: an argument has the wrong type or lies outside its range.
    """

    _: KW_ONLY
    process_group: dist.ProcessGroup | None = None
    warmup_steps: Count = 0
    bucket_cap_mb: Positive = 25.0
    average_buffers: Names = ()
    island: IslandRanks | None = None
    compression: Literal["bf16", "int8", "int4"] | None = None

    def __post_init__(self) -> None:
        Joinable.__init__(self)
        if not isinstance(self.process_group, dist.ProcessGroup | None):
            raise refusal(
                "process_group", self.process_group, "a torch.distributed.ProcessGroup or None"
            )
        checked_fields(self)
        one_of("compression", self.compression, (None, *CODECS))
        if hides(self.tau) and self.delay == 0:
            raise HyperParameterError(
                f"tau={self.tau!r} looks for rounds that are hidden, and {type(self).__name__} "
                "waits for every one of them; give a number, or take an overlapped algorithm or a "
                "delay."
            )
        self._forget()
        when_forwarded(self)

    def _forget(self) -> None:
        """Be a state that is not registered."""
        self._engine: Engine | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._optimizers: OptimizerWatch | None = None
        self._model_watch: ModelWatch | None = None
        self._announcements: RemovableHandle | None = None
        self._closed: Stats | None = None
        self._bare_model: frozenset[int] = frozenset()
        self._factor_known = False

    @property
    def lr_factor(self) -> float:
        """What a learning rate that is right for DDP has to be multiplied by, for this algorithm.

        ``SGD(model.parameters(), lr=0.1 * state.lr_factor)``. It is worked out from the
        hyper-parameters and the number of workers: with it the consensus model moves as far in a
        round as DDP's would, if the gradients stay the same. (``docs/choosing.md`` shows where it
        comes from, and measures it.)
        """
        self._factor_known = True
        if self._engine is not None:
            return self.rate_factor(self._engine.layout.m)
        require_known_groups(self.process_group, self.island)
        return self.rate_factor(workers_of(self.island, self.process_group))

    def hyperparameters(self) -> dict[str, object]:
        """What decides the trajectory, as plain values, by the names the constructor takes."""
        return {
            field.name: plain(getattr(self, field.name))
            for field in sorted(fields(self), key=lambda field: bool(field.kw_only))
            if field.name not in _NO_HYPERPARAMETERS
        }

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.hyperparameters().items())
        return f"{type(self).__name__}({arguments})"

    def __setattr__(self, name: str, value: object) -> None:
        fixed = not name.startswith("_") and self.__dict__.get("_engine") is not None
        if fixed and name in {field.name for field in fields(self)}:
            raise RegistrationError(
                f"{name} cannot be set once the state is registered: the ranks have agreed on "
                f"{getattr(self, name)!r}. Call finish() and close(), and register a new state."
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            logger.warning("A process group cannot be copied or pickled; the copy has none.")
        unregistered = object.__new__(type(self))
        unregistered.__dict__.update(self.__dict__)
        unregistered._forget()
        unregistered.process_group = None
        if isinstance(self.island, dist.ProcessGroup):
            logger.warning("An island's process group cannot be copied; the copy has no islands.")
            unregistered.island = None
        return unregistered.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        when_forwarded(self)

    # Registration.

    @property
    def model(self) -> nn.Module | None:
        """The model that this state is registered on; None before, or if it is gone."""
        return self._model() if self._model is not None else None

    def register(
        self,
        model: nn.Module,
        *optimizers: object,
        scaler: torch.amp.GradScaler | None = None,
        **unknown: object,
    ) -> None:
        """Register this state with a model; on DDP, as its communication hook. Collective.

        DDP's broadcast of buffers at every forward is switched off: it is a blocking collective
        a step. Buffers stay local while training; see :meth:`averaged` for the consensus model.

        Args:
            model: a ``DistributedDataParallel``, compiled or not, as built or as
                ``accelerator.prepare`` or Fabric's ``setup`` returns it. Or a module that
                ``torch.distributed.fsdp.fully_shard`` was applied to, over a mesh of the ranks of
                one island; ``process_group`` is then the group of the ranks that hold the same
                shard in the other islands.
            *optimizers: all that update the model, as built or as ``accelerator.prepare`` or
                Fabric's ``setup`` returns them. A boundary runs right after the last of them has
                stepped.
            scaler: the loop's GradScaler, if it uses one, so that a step it skips counts too.
                Optimizers prepared by Accelerate or Fabric bring theirs.
            **unknown: refused by name.

        Raises:
            RegistrationError: an argument or a checkpoint that was loaded before does not fit, a
                parameter belongs to another state, or the ranks disagree on the algorithm, its
                hyper-parameters or the parameters. Raised on every rank; nothing has changed.
        """
        if not isinstance(self, CommHookState):
            raise RegistrationError(
                "register was called on a class; build a state first: "
                "state = commhooks.LocalSGD(tau=8); state.register(ddp_model, optimizer)."
            )
        require_process_group()
        require_known_groups(self.process_group, self.island)
        sharded = as_sharded(model)
        if sharded is not None:
            self._register_sharded(sharded, optimizers, scaler, unknown)
            return
        ddp = unwrap_ddp(model)
        require_known_groups(ddp and ddp.process_group)
        refusal: str | None = None
        unwrapped: list[Optimizer] = []
        try:
            refuse_unknown(unknown)
            ddp = self._check_model(ddp, type(model))
            parameters = synchronized_parameters(ddp)
            unwrapped = check_optimizers(optimizers, list(parameters.values()))
            scaler = check_scaler(scaler, optimizers)
        except RegistrationError as error:
            refusal = str(error)
        self._build(ddp, refusal, {"optimizers": len(optimizers)}, unwrapped)
        assert ddp is not None
        ddp.register_comm_hook(self, comm_hook)
        self._watch(ddp, unwrapped, scaler)

    def _register_sharded(
        self,
        model: FSDPModule,
        optimizers: Sequence[object],
        scaler: torch.amp.GradScaler | None,
        unknown: Mapping[str, object],
    ) -> None:
        assert isinstance(model, nn.Module)
        parameters = trainable(model)
        refusal: str | None = None
        unwrapped: list[Optimizer] = []
        mesh: dist.ProcessGroup | None = None
        try:
            mesh = check_sharded(parameters, self.process_group, elementwise=self.elementwise)
            refuse_unknown(unknown)
            self._refuse_registered()
            if self.island is not None:
                raise RegistrationError(
                    "island is for DDP models; the ranks of a sharded model are its island."
                )
            refuse_claimed(parameters)
            self._fit_to(parameters)
            check_pruning(model, None if self.synchronous else self.warmup_steps)
            check_patterns(model, self.average_buffers)
            unwrapped = check_optimizers(optimizers, list(parameters.values()))
            scaler = check_scaler(scaler, optimizers)
            if scaler is not None and (self.warmup_steps or self.synchronous):
                raise RegistrationError(
                    "While gradients of a sharded model are averaged between the islands, a "
                    "GradScaler may skip the step of one and not of another. Use bfloat16 "
                    "(MixedPrecisionPolicy), which needs none, or warmup_steps=0."
                )
        except RegistrationError as error:
            refusal = str(error)
        first_tau = 1
        try:
            first_tau = self._first_tau(unwrapped)
        except RegistrationError as error:
            refusal = refusal or str(error)
        facts = self._facts(parameters)
        facts |= {"optimizers": len(optimizers), "the first tau": first_tau}
        parent, layout = meet(mesh, self.process_group, facts, refusal)
        check = ShardCheck(model, parameters)
        self._start(
            Engine(
                self,
                parent,
                layout,
                parameters,
                self.warmup_steps,
                self.bucket_cap_mb * 2**20,
                check,
                first_tau=first_tau,
                local=local_shard,
                reshard=check.reshard,
            ),
            model,
        )
        claim(self, parameters)
        assert self._engine is not None
        self._model = weakref.ref(model)
        self._engine.others.model = self._model
        self._optimizers = ShardedWatch(
            self._engine, list(parameters.values()), unwrapped, scaler=scaler
        )
        self._engine.read_rates_from(self._optimizers.rates)
        self._model_watch = ModelWatch(
            model, self._before_sharded_forward, self._before_load, self._optimizers.close
        )
        self._engine.watch(model)

    def before_first_forward(self, model: nn.Module) -> None:
        """The model that this state is the hook of is about to run (the bare form). Collective."""
        ddp = unwrap_ddp(model)
        require_known_groups(self.process_group, self.island, ddp and ddp.process_group)
        refusal: str | None = None
        try:
            self._check_model(ddp, type(model), bare=True)
        except RegistrationError as error:
            refusal = str(error)
        self._build(ddp, refusal, {}, ())
        assert ddp is not None
        self._bare_model = frozenset(map(id, ddp.module.parameters()))
        self._watch(ddp, (), None)

    def _check_model(
        self, ddp: DistributedDataParallel | None, given: type, *, bare: bool = False
    ) -> DistributedDataParallel:
        self._refuse_registered()
        ddp = check_model(ddp, given, hooked=bare)
        check_group(self.process_group, ddp)
        check_pruning(ddp.module, None if self.synchronous else self.warmup_steps)
        check_patterns(ddp.module, self.average_buffers)
        parameters = synchronized_parameters(ddp)
        refuse_claimed(parameters)
        self._fit_to(parameters)
        return ddp

    def _refuse_registered(self) -> None:
        if self._closed is not None:
            raise RegistrationError("This state is closed; build a new one (copy.copy will do).")
        if self._engine is not None:
            raise RegistrationError(
                "This state is registered already; build one state for every model."
            )

    def _fit_to(self, parameters: Mapping[str, Tensor]) -> None:
        for part in partition(parameters, self.fragments):
            self.fit(part)

    def _facts(self, parameters: Mapping[str, Tensor]) -> dict[str, object]:
        """What the ranks must have in common."""
        return {
            "algorithm": type(self).__name__,
            **self.hyperparameters(),
            "bucket_cap_mb": self.bucket_cap_mb,
            "average_buffers": self.average_buffers,
            "checkpoint to load": self._loaded is not None,
            **parameter_facts(parameters),
        }

    def _build(
        self,
        ddp: DistributedDataParallel | None,
        refusal: str | None,
        facts: dict[str, object],
        optimizers: Sequence[Optimizer],
    ) -> None:
        """Agree with the other ranks, and take hold of the parameters. Collective."""
        group = self.process_group or (ddp.process_group if ddp else _world())
        parameters = synchronized_parameters(ddp) if ddp else {}
        facts = self._facts(parameters) | facts
        mine: tuple[int, ...] = ()
        first_tau = 1
        try:
            mine = island_of(self.island, group)
            first_tau = self._first_tau(optimizers)
        except RegistrationError as error:
            refusal = refusal or str(error)
        facts |= {"ranks in an island": len(mine), "the first tau": first_tau}
        agree(group, facts, refusal)
        assert ddp is not None
        self._start(
            Engine(
                self,
                group,
                settle_layout(group, mine),
                parameters,
                self.warmup_steps,
                self.bucket_cap_mb * 2**20,
                ParameterCheck(ddp, parameters.values()),
                first_tau=first_tau,
                static_graph=ddp.static_graph,
                find_unused=ddp.find_unused_parameters,
            ),
            ddp,
        )

    def _first_tau(self, optimizers: Sequence[Optimizer]) -> int:
        rates = {float(g["lr"]) for each in optimizers for g in each.param_groups if "lr" in g}
        try:
            return chosen(self.tau, 0, sorted(rates, reverse=True), Stats())
        except HyperParameterError as error:
            raise RegistrationError(str(error)) from error

    def _start(self, engine: Engine, model: nn.Module) -> None:
        module, ignored = _without_ddp(model)
        compare_outside(module, engine.names, ignored, engine.links)
        self._load_together(engine)
        self._engine = engine
        factor = self.rate_factor(engine.layout.m)
        if not self._factor_known and abs(math.log(factor)) > _NOTABLE and engine.speaks:
            logger.warning(
                "commhooks: %s wants %.3g times the learning rate that is right for DDP, or it "
                "learns at another speed. Write lr=... * state.lr_factor, which is %.3g here; to "
                "read state.lr_factor also ends this message.",
                type(self).__name__,
                factor,
                factor,
            )
        no_longer(self)

    def _watch(
        self,
        ddp: DistributedDataParallel,
        optimizers: Sequence[Optimizer],
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        assert self._engine is not None
        # A strong reference would close a cycle through DDP's reducer, which no collector sees.
        self._model = weakref.ref(ddp)
        self._engine.others.model = self._model
        parameters = synchronized_parameters(ddp)
        claim(self, parameters)
        self._optimizers = OptimizerWatch(
            self._engine, parameters.values(), optimizers, scaler=scaler
        )
        self._engine.read_rates_from(self._optimizers.rates)
        self._model_watch = ModelWatch(
            ddp, self._before_forward, self._before_load, self._optimizers.close
        )
        self._engine.watch(ddp.module)
        if ddp.forward_sync_buffers and any(True for _ in ddp.module.buffers()):
            logger.info(
                "commhooks: DDP no longer broadcasts buffers at every forward; averaged() and "
                "finish() average BatchNorm's statistics and give every rank the first one's of "
                "the others."
            )
        ddp.forward_sync_buffers = False
        if ddp.find_unused_parameters:
            logger.warning(
                "commhooks: find_unused_parameters=True makes DDP all-reduce a bitmap at every "
                "step, which no hook can prevent; use static_graph=True where the graph allows."
            )

    def reduce_gradients(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """What :func:`commhooks.comm_hook` calls for every gradient bucket of a backward."""
        if bucket.buffer().is_sparse:
            raise RegistrationError(
                "A gradient is sparse, which a DDP communication hook cannot take; build the "
                "embedding with sparse=False."
            )
        if self._engine is None:
            if bucket.is_last():
                raise_after_backward(
                    RegistrationError(
                        "The state of this model is closed; wrap the module in a new "
                        "DistributedDataParallel and register a new state."
                        if self._closed is not None
                        else "The state has not seen this model's forward, before which it "
                        "registers: call ddp_model(x), not ddp_model.forward(x), and give every "
                        "DDP model a state of its own."
                    )
                )
            return done(bucket.buffer())
        # All of the model's: those that were frozen when it registered are in DDP's buckets, too.
        known = self._bare_model
        if known and bucket.is_last() and known.isdisjoint(map(id, bucket.parameters())):
            raise_after_backward(
                RegistrationError(
                    "This state is the hook of another DDP model already; build one state for "
                    "every DDP model."
                )
            )
            return done(bucket.buffer())
        return self._engine.reduce_gradients(bucket)

    @property
    def _engine_here(self) -> Engine | None:
        """The engine, on the thread that trains; a forward on any other is none of its business."""
        engine = self._engine
        return engine if engine is not None and engine.thread.is_this else None

    def _before_forward(self, model: DistributedDataParallel) -> None:
        engine, optimizers = self._engine_here, self._optimizers
        if engine is None or optimizers is None:
            return
        if not model._lazy_init_ran:
            refuse_optimizers_in_backward(model)
        engine.before_forward(model)
        trains = torch.is_grad_enabled() and model.require_backward_grad_sync
        joined = model._join_config.enable and not self._join_config.enable
        if trains and joined and not engine.averages_gradients_for_good:
            raise RegistrationError(
                "The model is in a Join context that the state is not in, so a rank that is out of "
                "batches would not take part in the rounds of the others. Use "
                "torch.distributed.algorithms.Join([state, ddp_model]) instead of model.join() or "
                "join_uneven_inputs([model])."
            )
        optimizers.before_forward()

    def _before_sharded_forward(self) -> None:
        if (engine := self._engine_here) is not None and self.model is not None:
            engine.before_forward(self.model)

    def _before_load(self) -> None:
        """``model.load_state_dict`` is about to write to the parameters."""
        if self._engine is None:
            return
        self._engine.refuse_inside_averaged("model.load_state_dict()")
        self._engine.parameters_overwritten()

    def _registered(self) -> Engine:
        if self._closed is not None:
            raise RegistrationError("This state is closed; build and register a new one.")
        if self._engine is None:
            raise RegistrationError(
                "This state is not registered yet; call state.register(ddp_model, optimizer), or "
                "run the first forward after ddp_model.register_comm_hook."
            )
        return self._engine

    # Use.

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the consensus model inside the block, and the rank's own outside. Collective.

        The consensus model has the mean over ranks of their parameters, and of statistics that make
        sense as a mean: the running mean and variance of normalisation layers, and the buffers that
        ``average_buffers`` names. Its other buffers are the first rank's, as DDP would have
        broadcast them, except what cannot be sent (sparse tensors, expanded ones, and caches of
        another shape on every rank), which stays a rank's own; and ``u`` and ``v`` of spectral
        norm, which are those of the mean. Frozen parameters that differ between ranks, such as an
        EMA teacher, are their mean, or the first rank's if they are no floating-point numbers.

        What a rank had is put back bit for bit, after an exception too; the trajectory of training
        is the one it would be without the block. Blocks may be nested. Ctrl-C is held back until
        the ranks are through with one another.

        Its place is after the optimizer's step. Between a backward and its step, a boundary that is
        due runs before the block, on the parameters as they are before the step.

        Raises:
            RoundError: a round failed, the ranks are not at the same point, or one of them cannot
                take part; the models are as they were.
            RegistrationError: not registered yet; or a backward or ``model.load_state_dict`` runs
                inside the block. Such a backward is no step; if the error is caught, training can
                go on once its gradients are cleared.
        """
        engine = self._registered()
        block = object()
        try:
            engine.enter_consensus("averaged()", self._hold, block)
            yield
        finally:
            try:
                engine.leave_consensus(block)
            except KeyboardInterrupt:
                # It came before the parameters were put back.
                engine.leave_consensus(block)
                raise

    def finish(self) -> None:
        """Drain what is in flight and end on the consensus model, on every rank. Collective.

        If training goes on, the algorithm begins anew: the anchor is the consensus model, and
        boundaries are counted from here.

        Raises:
            RoundError: a round failed, or the averaging did; the models are as they were.
            RegistrationError: not registered yet, or inside ``averaged()``.
        """
        self._registered().finish("finish()", self._hold)

    def disable(self) -> None:
        """Average gradients as plain DDP does, from the next step on. Collective.

        DDP's hooks cannot be removed. Ends on the consensus model first, like :meth:`finish`,
        since gradient averaging alone would never bring the ranks' models together again. An
        optimizer's state stays what it is: momentum gathered locally still differs between ranks.
        """
        engine = self._registered()
        with uninterrupted():
            engine.finish("disable()", self._hold)
            engine.disable()

    def close(self) -> None:
        """End the registration and give back what it holds: groups, threads, hooks. Collective.

        Call it after :meth:`finish`. The module can then be wrapped in a new
        ``DistributedDataParallel``, on which a new state is registered; a copy of this one is a new
        state. :attr:`stats` can still be read. Closing twice does nothing.

        Raises:
            RoundError: the ranks are not at the same point.
            RegistrationError: not registered yet, inside ``averaged()``, or steps were made since
                :meth:`finish`.
        """
        if self._closed is not None:
            return
        engine = self._registered()
        engine.refuse_inside_averaged("close()")
        engine.refuse_unfinished()
        with uninterrupted():
            engine.close()
            self._closed = engine.stats()
            for watch in (self._optimizers, self._model_watch):
                if watch is not None:
                    watch.close()
            if self._announcements is not None:
                self._announcements.remove()
            self._engine = self._optimizers = self._model_watch = self._announcements = None
            release(self)

    # Ranks with different numbers of batches: `with Join([state, ddp_model]):`.

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """What ``torch.distributed.algorithms.Join`` runs on a rank that is out of batches.

        The rank shadows the others' rounds with its last parameters; at the end of the context
        all ranks finish together. The state comes first: ``Join([state, ddp_model])``. Batches
        should not run out during warm-up, where the rank would miss the others' updates; and the
        last one of each rank must be followed by its optimizers' step.

        An island goes on training until its last rank is out of batches. Those that are out of them
        add nothing to its gradients, which are still divided by the number of its ranks, and take
        its parameters at every boundary and, with the states of optimizers and scaler, at the end.

        Raises:
            RegistrationError: not registered yet; the model is not a DDP one; or it has
                ``find_unused_parameters``, with islands or compressed rounds.
        """
        engine, model = self._registered(), self.model
        if model is None:
            raise RegistrationError("Join needs a model, and this state's is gone.")
        if not isinstance(model, DistributedDataParallel):
            raise RegistrationError(
                "Join is for DDP models; a sharded one takes no part in it. Give all ranks the "
                "same number of batches, such as with drop_last=True."
            )
        needs_others = engine.layout.size > 1 or self.compression is not None
        if needs_others and model.find_unused_parameters:
            raise RegistrationError(
                "Join with islands or compression cannot be used with find_unused_parameters=True, "
                "whose bitmap the ranks with batches would wait for while the others wait for a "
                "round. Let every forward use all parameters, or give all ranks the same number of "
                "batches."
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
        return self._registered().links.everyone.parent

    def shadow_step(self) -> None:
        """Take part in a step of the ranks that still have batches; called by Join."""
        self._registered().shadow_step()

    def end_shadowing(self) -> None:
        """Finish with the others at the end of a Join context; called by Join."""
        if self._announcements is not None:
            self._announcements.remove()
        assert self._optimizers is not None
        self._registered().end_shadowing(self._optimizers)
        self.finish()

    def _announce_step(self, model: DistributedDataParallel, args: object) -> None:
        """Tell the ranks that are out of batches that a forward begins, as DDP itself would."""
        if not torch.is_grad_enabled() or self._engine_here is None:
            return
        if self._join_config.enable and not self._join_config.is_first_joinable:
            raise RegistrationError(
                "The state must come first, Join([state, ddp_model]), so that its rounds are "
                "shadowed before DDP's hook is called."
            )
        Join.notify_join_context(self)

    def observe(self, loss: float | Tensor) -> None:
        """Tell the loss of a step, for a period that looks at it (:class:`~.periods.AdaComm`).

        Args:
            loss: a number, or a tensor of one, which is not waited for.

        Raises:
            RegistrationError: not registered yet.
        """
        self._registered().observe(loss)

    def drift(self) -> DriftTable:
        """Which parameters the workers differ in: a table, the worst one first. Collective.

        ``stats`` has the same figures for the whole model, at no cost. This compares the parameters
        as they are now, and sends as much as a round does.

        Raises:
            RoundError: a round failed, the ranks are not at the same point, or one of them cannot
                take part.
            RegistrationError: not registered yet, inside ``averaged()``, or there are no local
                steps: in warm-up, after ``disable()``, with ``AllReduce``.
        """
        return self._registered().drift()

    @property
    def stats(self) -> Stats:
        """A snapshot of what this rank has sent, waited for and hidden; zeros before a start."""
        engine = self._engine
        return engine.stats() if engine is not None else self._closed or Stats()

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
        return {"format": FORMAT} | self._identity(engine) | engine.state_dict()

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse what :meth:`load_state_dict` would refuse; nothing changes.

        Raises:
            CheckpointError: another format, algorithm, hyper-parameter, rank or shape, or damaged.
        """
        mine = {"algorithm": type(self).__name__, "hyperparameters": self.hyperparameters()}
        check_identity(state_dict, mine)
        if self._engine is not None:
            self._check(state_dict, self._engine)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; the parameters are the caller's to load.

        Before the parameters are known (before ``register``; in the bare form before the first
        forward), the values are kept until then. On another number of ranks than saved, load the
        consensus model on all of them, and any rank's dictionary; in islands of the same size, that
        of any rank at the same place, such as ``rank % size_of_an_island``. What had to be reset is
        logged.

        Raises:
            CheckpointError: another format, algorithm, hyper-parameter, rank or shape, or damaged.
                Nothing has changed. Of values that were kept, RegistrationError says so on every
                rank.
            RegistrationError: inside ``averaged()``.
        """
        self.check_state_dict(state_dict)
        if self._engine is None:
            self._loaded = state_dict
        else:
            self._load(state_dict, self._engine)

    def _load_together(self, engine: Engine) -> None:
        """Load what was kept; refused on every rank if it does not fit on one. Collective."""
        if self._loaded is None:
            return
        problem = None
        try:
            self._check(self._loaded, engine)
        except CheckpointError as error:
            problem = str(error)
        agree(engine.links.everyone.parent, {}, problem)
        self._load(self._loaded, engine)
        self._loaded = None

    def _check(self, loaded: Mapping[str, Any], engine: Engine) -> None:
        mine = self._identity(engine)
        if not engine.saving.same_ranks(loaded):
            # Any rank's vectors will do, or none.
            mine = {k: v for k, v in mine.items() if k not in engine.saving.identity}
        check_identity(loaded, mine)
        engine.check_state_dict(loaded)

    def _load(self, loaded: Mapping[str, Any], engine: Engine) -> None:
        kept = engine.load_state_dict(loaded)
        if not engine.saving.same_ranks(loaded):
            logger.warning(
                "commhooks: the checkpoint is of %s ranks in islands of %s, this run has %s in "
                "islands of %s; load the consensus model on every rank. %s",
                loaded["world_size"],
                loaded["island_size"],
                engine.saving.identity["world_size"],
                engine.layout.size,
                "The anchor goes on."
                if kept
                else "The algorithm's vectors were reset: it starts anew from the parameters.",
            )

    def _identity(self, engine: Engine) -> dict[str, Any]:
        return {
            "algorithm": type(self).__name__,
            "hyperparameters": self.hyperparameters(),
            **engine.saving.identity,
        }

    def _hold(self) -> Held:
        """What the model holds besides the parameters that are averaged."""
        model, engine = self.model, self._engine
        if model is None or engine is None:
            return Held()
        module, ignored = _without_ddp(model)
        return Held(
            find_buffers(module, ignored, self.average_buffers),
            find_frozen(module, engine.names, ignored),
            [] if module is model else list(find_spectral(module)),
        )


def _without_ddp(model: nn.Module) -> tuple[nn.Module, Container[str]]:
    """The module, and the names of what in it stays a rank's own."""
    if isinstance(model, DistributedDataParallel):
        return model.module, model.parameters_to_ignore
    return model, ()


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world
