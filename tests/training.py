"""What a rank does in most tests: build, register, train, and note the parameters."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import commhooks
from tests.cases import Case
from tests.reference import flat
from tests.workload import TINY_CAP_MB, trained

Form = Literal["register", "hook"]


def make_state(case: Case, **others: Any) -> commhooks.CommHookState:
    """The library's state of ``case``, in buckets that are small enough to be several."""
    made: commhooks.CommHookState = getattr(commhooks, case.algorithm)(
        **{**case.arguments, **case.keywords, **others}
    )
    return made


def wrapped(module: nn.Module, **options: Any) -> DistributedDataParallel:
    """DDP with gradient buckets that are small enough to be several."""
    return DistributedDataParallel(module, **{"bucket_cap_mb": TINY_CAP_MB, **options})


def attach(
    state: commhooks.CommHookState,
    model: DistributedDataParallel,
    optimizers: Sequence[Optimizer],
    form: Form = "register",
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    if form == "register":
        state.register(model, *optimizers, scaler=scaler)
    else:
        model.register_comm_hook(state, commhooks.comm_hook)


class Trainer:
    """This rank's DDP model, optimizers and registered state, in an ordinary training loop."""

    def __init__(
        self,
        case: Case,
        form: Form = "register",
        scaler: torch.amp.GradScaler | None = None,
        state: commhooks.CommHookState | None = None,
        **options: Any,
    ) -> None:
        self.case = case
        self.form = form
        self.rank = dist.get_rank()
        self.steps = 0
        self.model = wrapped(case.model(case.dtype), **case.ddp)
        self.optimizers = case.optimizers(self.model)
        self.state = make_state(case, **options) if state is None else state
        attach(self.state, self.model, self.optimizers, form, scaler)

    @property
    def x(self) -> Tensor:
        return flat(trained(self.model))

    def step(self) -> Tensor:
        """The parameters after one more step."""
        self.steps += 1
        self.backward()
        self.optimize()
        return self.x

    def finishing(self, after: Sequence[int]) -> list[Tensor]:
        """The parameters after every step, and after ``finish`` behind those in ``after``."""
        seen = []
        for step in range(1, self.case.steps + 1):
            seen.append(self.step())
            if step in after:
                self.state.finish()
                seen.append(self.x)
        return seen

    def saved(self) -> dict[str, Any]:
        """What a user saves of one rank."""
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "state": self.state.state_dict(),
            }
        )

    def go_on(self, saved: Mapping[str, Any], step: int) -> None:
        """Load what was saved after ``step``, in the order that a script does it in."""
        self.steps = step
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.state.load_state_dict(saved["state"])

    def backward(self) -> None:
        self.case.backward(self.model, self.rank, self.steps)

    def optimize(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def trajectory(case: Case, form: Form = "register") -> list[Tensor]:
    """This rank's parameters after every step, over real processes."""
    trainer = Trainer(case, form)
    return [trainer.step() for _ in range(case.steps)]


def trajectories(cases: Sequence[Case], form: Form = "register") -> list[list[Tensor]]:
    return [trajectory(case, form) for case in cases]
