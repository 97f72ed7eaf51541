"""Trajectories whose every bit is recorded, so that a change of the code is known to change none.

The numbers come from elementwise operations alone, which IEEE 754 defines: a product of matrices
has other last bits on another processor. ``python -m tests.golden.bits`` records them anew, which
is right only where a change of the numbers is meant.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from tests.cases import PERIODIC, Case, of_every_algorithm
from tests.harness import run_ranks
from tests.sharded.training import TIDY, ShardedTrainer
from tests.training import Form, Trainer
from tests.workload import initialise

RECORDED = Path(__file__).parent / "bits.json"
SIZE = 4
WIRES = (None, "bf16", "int8", "int4")
FORMS = ("register", "hook", "islands", "sharded")
GROUPS = list(itertools.product(FORMS, WIRES))


class Bowl(nn.Module):
    """The loss of every number by itself; its gradient is p / 2 + slope."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, phase: int) -> Tensor:
        # Sums of a few powers of two, which no format rounds.
        slopes = ((torch.arange(self.weight.numel()) * 37 + phase) % 17 - 8).div(64)
        losses: Tensor = self.weight * (self.weight * 0.25 + slopes.view_as(self.weight))
        return losses.sum()


class Bowls(nn.ModuleList):
    def forward(self, phase: int) -> Tensor:
        return torch.stack([bowl(phase) for bowl in self]).sum()


def bowls(dtype: torch.dtype) -> nn.Module:
    """Blocks of 256 of which the last one is not full, and pieces that nothing divides."""
    return initialise(Bowls(map(Bowl, (765, 153, 434, 3)))).to(dtype)


def downhill(model: nn.Module, rank: int, step: int) -> None:
    """Backward with slopes of a rank's and a step's own."""
    torch.autograd.backward(model(11 * rank + 7 * step))


def cases(form: str, wire: str | None) -> list[Case]:
    """Every algorithm, and fragments in flight together; with warm-up and without."""
    settings: dict[str, Any] = {
        "model": bowls,
        "backward": downhill,
        "compression": wire,
        "island": 1 if form in ("register", "hook") else 2,
        "cap_mb": 1e-3,
    }
    streaming: dict[str, Any] = {
        "outer": partial(SGD, lr=0.7, momentum=0.9, nesterov=True),
        "merge": "carry",
    }
    todo = [
        *of_every_algorithm(((1, 2), (3, 0)), PERIODIC, **settings),
        Case("DiLoCo", {"tau": 4, "fragments": 4, "delay": 3}, **settings),
        Case("DiLoCo", {"tau": 4, "fragments": 3, "delay": 2, **streaming}, 1, **settings),
    ]
    return (
        todo
        if wire is not None
        else [*todo, *of_every_algorithm([(1, 0)], ["AllReduce"], **settings)]
    )


def name(case: Case) -> str:
    arguments = {
        key: f"{value.func.__name__}{value.keywords}" if isinstance(value, partial) else value
        for key, value in case.arguments.items()
    }
    return f"{case.algorithm} {arguments} warmup_steps={case.warmup_steps}"


def digests(form: str, todo: Sequence[Case]) -> list[str]:
    """A number for every case that stands for all bits of this rank's trajectory."""
    return [_digest(_trajectory(form, case)) for case in todo]


def _trajectory(form: str, case: Case) -> list[Tensor]:
    """Training, the consensus on the way, a new beginning, and more training."""
    trainer: Trainer | ShardedTrainer
    if form == "sharded":
        trainer = ShardedTrainer(case)
    else:
        way: Form = "hook" if form == "hook" else "register"
        trainer = Trainer(case, way)
    seen = [trainer.step() for _ in range(case.steps)]
    with trainer.state.averaged():
        seen.append(trainer.x)
    seen += [trainer.step() for _ in range(2)]
    trainer.state.finish()
    seen += [trainer.x, *(trainer.step() for _ in range(case.tau + 2))]
    return seen


def _digest(seen: Sequence[Tensor]) -> str:
    taken = hashlib.sha256()
    for x in seen:
        taken.update(x.detach().contiguous().numpy().tobytes())
    return taken.hexdigest()[:16]


def measure(form: str, wire: str | None) -> Mapping[str, str]:
    """Every case's digests, one a rank."""
    todo = cases(form, wire)
    ranks = run_ranks(digests, SIZE, form, todo, timeout=120.0, tidy=form != "sharded" or TIDY)
    return {name(case): " ".join(rank[at] for rank in ranks) for at, case in enumerate(todo)}


def recorded(form: str, wire: str | None) -> Mapping[str, str]:
    found: Mapping[str, str] = json.loads(RECORDED.read_text())[f"{form} {wire}"]
    return found


if __name__ == "__main__":
    found = {f"{form} {wire}": measure(form, wire) for form, wire in GROUPS}
    RECORDED.write_text(json.dumps(found, indent=1) + "\n")
