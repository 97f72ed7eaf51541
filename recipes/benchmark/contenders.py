"""Who is measured: ways to train a DDP model over a slow network, all set up by the same call."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import commhooks
from benchmark.torchft import diloco, local_sgd, torchft_refusal
from commhooks import CommHookState

__all__ = [
    "ALONE",
    "BASELINE",
    "DELAYED",
    "FLAT",
    "INT4",
    "INT8",
    "ISLANDS",
    "STREAMING",
    "TORCHFT_DELAYED",
    "Attached",
    "Contender",
    "Kind",
    "contenders",
    "skipped",
]

BASELINE = "no communication"
ALONE = "an all-reduce alone, every tau"
"""No contender, but what none that averages models can do without: its all-reduce.

Where several ranks share a machine, each all-reduces its share of the model with its peers."""
DELAYED = "commhooks DiLoCo, delay=tau"
STREAMING = "commhooks DiLoCo, 4 fragments"
TORCHFT_DELAYED = "torchft DiLoCo, delayed"
FLAT = "commhooks OverlapLocalSGD, every rank a worker"
ISLANDS = "commhooks islands,"
INT8 = "commhooks OverlapLocalSGD, int8"
INT4 = "commhooks OverlapLocalSGD, int4"
_FRAGMENTS = 4
Kind = Literal["none", "step", "blocking", "overlapped"]


@dataclass
class Attached:
    """A contender at work on one model.

    Attributes:
        after_step: what its user calls after every optimizer step.
        state: ours, if it is one of ours.
    """

    after_step: Callable[[], None] = lambda: None
    state: CommHookState | None = None


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        name: what it is called in tables.
        kind: when it communicates: never, at every step, or every tau steps, blocking or not.
        attach: sets it up on a model. What must be closed when done goes on the stack.
        one_bucket: whether DDP is to put all gradients into one bucket.
        fragments: rounds that it takes to average the whole model once.
    """

    name: str
    kind: Kind
    attach: Callable[[DistributedDataParallel, Optimizer, int, ExitStack], Attached]
    one_bucket: bool = False
    fragments: int = 1

    @property
    def ours(self) -> bool:
        """Whether it is this library's."""
        return self.name.startswith("commhooks")


def contenders() -> list[Contender]:
    """All of them, no communication first; of machines of several ranks, those that know them."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return _of_islands(per_node) if per_node > 1 else _of_ranks()


def _of_islands(size: int) -> list[Contender]:
    return [
        # Between machines, that is to say.
        Contender(BASELINE, "none", _inside_machines),
        Contender("DDP", "step", lambda *_: Attached()),
        Contender("torch post_localSGD, averager", "blocking", _post_local_sgd),
        Contender(FLAT, "overlapped", _ours(commhooks.OverlapLocalSGD)),
        Contender(
            f"{ISLANDS} OverlapLocalSGD",
            "overlapped",
            _ours(lambda tau: commhooks.OverlapLocalSGD(tau, island=size)),
        ),
        Contender(
            f"{ISLANDS} DiLoCo",
            "overlapped",
            _ours(lambda tau: commhooks.DiLoCo(tau, delay=tau, alpha=0.5, island=size)),
        ),
        Contender(
            f"{ISLANDS} DiLoCo, carry",
            "overlapped",
            _ours(lambda tau: commhooks.DiLoCo(tau, delay=tau, merge="carry", island=size)),
        ),
        Contender(
            f"{ISLANDS} OverlapLocalSGD, int8",
            "overlapped",
            _ours(lambda tau: commhooks.OverlapLocalSGD(tau, island=size, compression="int8")),
        ),
    ]


def _of_ranks() -> list[Contender]:
    found = [
        Contender(BASELINE, "none", _identity),
        Contender("DDP", "step", lambda *_: Attached()),
        Contender("DDP, fp16", "step", _fp16),
        # With several buckets its chained all-reduces start in whatever order gloo's threads run,
        # which differs between ranks, and gloo ends the process.
        Contender("DDP, PowerSGD", "step", _power_sgd, one_bucket=True),
        Contender("torch post_localSGD, averager", "blocking", _post_local_sgd),
        Contender("accelerate LocalSGD", "blocking", _accelerate),
    ]
    if torchft_refusal() is None:
        found += [
            Contender("torchft LocalSGD", "blocking", _torchft(local_sgd)),
            Contender(TORCHFT_DELAYED, "overlapped", _torchft(diloco)),
        ]
    return [
        *found,
        Contender("commhooks AllReduce", "step", _ours(lambda tau: commhooks.AllReduce())),
        Contender("commhooks LocalSGD", "blocking", _ours(commhooks.LocalSGD)),
        Contender("commhooks BMUF", "blocking", _ours(commhooks.BMUF)),
        Contender("commhooks OverlapLocalSGD", "overlapped", _ours(commhooks.OverlapLocalSGD)),
        Contender(
            "commhooks OverlapLocalSGD, beta=0.7",
            "overlapped",
            _ours(lambda tau: commhooks.OverlapLocalSGD(tau, beta=0.7)),
        ),
        Contender(
            INT8,
            "overlapped",
            _ours(lambda tau: commhooks.OverlapLocalSGD(tau, compression="int8")),
        ),
        Contender(
            INT4,
            "overlapped",
            _ours(lambda tau: commhooks.OverlapLocalSGD(tau, compression="int4")),
        ),
        Contender("commhooks EASGD", "overlapped", _ours(commhooks.EASGD)),
        Contender("commhooks CoCoDSGD", "overlapped", _ours(commhooks.CoCoDSGD)),
        Contender("commhooks SlowMo", "blocking", _ours(commhooks.SlowMo)),
        Contender("commhooks DiLoCo", "blocking", _ours(commhooks.DiLoCo)),
        Contender(
            DELAYED,
            "overlapped",
            # Replacing the local models at the very launch would throw away all that was learnt.
            _ours(lambda tau: commhooks.DiLoCo(tau, delay=tau, alpha=0.5)),
        ),
        Contender(
            STREAMING,
            "overlapped",
            _ours(
                lambda tau: commhooks.DiLoCo(
                    tau, fragments=_FRAGMENTS, delay=tau // _FRAGMENTS, alpha=0.5
                )
            ),
            fragments=_FRAGMENTS,
        ),
    ]


def skipped() -> dict[str, str]:
    """Contenders that cannot take part here, and why."""
    reason = torchft_refusal()
    return {} if reason is None else {"torchft LocalSGD and DiLoCo": reason}


def _done(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _identity(
    model: DistributedDataParallel, optimizer: Optimizer, tau: int, stack: ExitStack
) -> Attached:
    model.register_comm_hook(None, _done)
    return Attached()


def _machine(stack: ExitStack) -> dist.ProcessGroup:
    """The ranks of this one's machine, until the turn ends: a group's thread never sleeps."""
    size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    subgroup, _ = dist.new_subgroups(group_size=size)  # type: ignore[no-untyped-call]
    stack.callback(dist.destroy_process_group, subgroup)
    return subgroup  # type: ignore[no-any-return]


def _inside_machines(
    model: DistributedDataParallel, optimizer: Optimizer, tau: int, stack: ExitStack
) -> Attached:
    subgroup = _machine(stack)
    model.register_comm_hook(subgroup, default_hooks.allreduce_hook)
    return Attached()


def _fp16(
    model: DistributedDataParallel, optimizer: Optimizer, tau: int, stack: ExitStack
) -> Attached:
    model.register_comm_hook(dist.group.WORLD, default_hooks.fp16_compress_hook)
    return Attached()


def _power_sgd(
    model: DistributedDataParallel, optimizer: Optimizer, tau: int, stack: ExitStack
) -> Attached:
    # 2 is the earliest that PowerSGD can begin to compress.
    state = PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook)
    return Attached()


def _post_local_sgd(
    model: DistributedDataParallel, optimizer: Optimizer, tau: int, stack: ExitStack
) -> Attached:
    # Averages gradients within a machine, which may be of one rank.
    subgroup = _machine(stack)
    state = PostLocalSGDState(None, subgroup, start_localSGD_iter=0)  # type: ignore[no-untyped-call]
    model.register_comm_hook(state, post_localSGD_hook)
    averager = PeriodicModelAverager(period=tau, warmup_steps=0)
    return Attached(lambda: averager.average_parameters(model.parameters()))


def _accelerate(
    model: DistributedDataParallel, optimizer: Optimizer, tau: int, stack: ExitStack
) -> Attached:
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    averager = LocalSGD(Accelerator(cpu=True), model, local_sgd_steps=tau)
    # Its __exit__ averages once more, for which nobody waits here.
    stack.enter_context(model.no_sync())
    return Attached(averager.step)


def _torchft(
    start: Callable[[DistributedDataParallel, Optimizer, int, ExitStack], None],
) -> Callable[[DistributedDataParallel, Optimizer, int, ExitStack], Attached]:
    def attach(
        model: DistributedDataParallel, optimizer: Optimizer, tau: int, stack: ExitStack
    ) -> Attached:
        model.register_comm_hook(None, _done)
        start(model, optimizer, tau, stack)
        return Attached()

    return attach


def _ours(
    build: Callable[[int], CommHookState],
) -> Callable[[DistributedDataParallel, Optimizer, int, ExitStack], Attached]:
    def attach(
        model: DistributedDataParallel, optimizer: Optimizer, tau: int, stack: ExitStack
    ) -> Attached:
        state = build(tau)
        state.register(model, optimizer)
        return Attached(state=state)

    return attach
