"""Pins ragged layouts: any shapes, mixed dtypes, bucket sizes and tau, against the reference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import commhooks
from tests import reference
from tests.cases import ALGORITHMS, PERIODIC
from tests.harness import run_ranks
from tests.training import wrapped
from tests.workload import plain_sgd, seeded

UNIT_IN_THE_LAST_PLACE = {torch.bfloat16: 2.0**-7, torch.float32: 1e-6, torch.float64: 1e-12}


@dataclass(frozen=True)
class Layout:
    """A model of nothing but parameters, and how it is trained."""

    shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]
    cap_mb: float
    ddp_cap_mb: float
    algorithm: str
    choice: int
    tau: int
    warmup_steps: int
    steps: int = 7

    @property
    def arguments(self) -> dict[str, object]:
        choices = ALGORITHMS[self.algorithm]
        arguments = {"tau": self.tau, **choices[self.choice % len(choices)]}
        if "fragments" in arguments:
            arguments["fragments"] = min(arguments["fragments"], len(self.shapes))
        return arguments


class Parameters(nn.Module):
    def __init__(self, layout: Layout) -> None:
        super().__init__()
        generator = seeded(3)
        self.parameters_ = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for shape, dtype in layout.shapes
        )

    def forward(self, rank: int, step: int) -> Tensor:
        """A loss whose gradient, the same wherever the parameters are, differs at every step."""
        generator = seeded(rank + 1, step)
        products = [
            (p * torch.randn(p.shape, generator=generator).to(p.dtype)).sum().double()
            for p in self.parameters_
        ]
        return torch.stack(products).sum()


def backward(model: nn.Module, rank: int, step: int) -> None:
    torch.autograd.backward(model(rank, step))


def real_trajectories(layouts: Sequence[Layout]) -> list[list[list[Tensor]]]:
    """Each layout's parameters, one by one, after every step."""
    return [_real_trajectory(layout) for layout in layouts]


def _real_trajectory(layout: Layout) -> list[list[Tensor]]:
    model = wrapped(Parameters(layout), bucket_cap_mb=layout.ddp_cap_mb)
    (optimizer,) = plain_sgd(model)
    state: commhooks.CommHookState = getattr(commhooks, layout.algorithm)(
        **layout.arguments, warmup_steps=layout.warmup_steps, bucket_cap_mb=layout.cap_mb
    )
    state.register(model, optimizer)
    steps = []
    for step in range(1, layout.steps + 1):
        backward(model, torch.distributed.get_rank(), step)
        optimizer.step()
        optimizer.zero_grad()
        steps.append([p.detach().clone() for p in model.parameters()])
    return steps


shapes = st.lists(st.integers(1, 6), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
caps = st.floats(-7, 1).map(lambda exponent: math.pow(10, exponent))
layouts = st.builds(
    Layout,
    shapes=st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=6),
    cap_mb=caps,
    ddp_cap_mb=caps,
    algorithm=st.sampled_from(PERIODIC),
    choice=st.integers(0, 1),
    tau=st.integers(1, 3),
    warmup_steps=st.integers(0, 2),
)


@settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(st.lists(layouts, min_size=1, max_size=4), st.sampled_from([2, 3]))
def test_any_layout_follows_the_equations(layouts: Sequence[Layout], size: int) -> None:
    """Several layouts a launch, since launching ranks is what takes the time."""
    ranks = run_ranks(real_trajectories, size, layouts)
    for layout, *real in zip(layouts, *ranks, strict=True):
        made: reference.Reference = getattr(reference, layout.algorithm)(**layout.arguments)
        workers = reference.Workers(made, Parameters(layout), plain_sgd, size, layout.warmup_steps)
        for step in range(layout.steps):
            workers.step(backward)
            for rank, model in enumerate(workers.models):
                for mine, expected in zip(real[rank][step], model.parameters(), strict=True):
                    assert mine.dtype == expected.dtype
                    allowed = UNIT_IN_THE_LAST_PLACE[mine.dtype] * max(
                        1.0, expected.abs().max().item()
                    )
                    assert (mine - expected).abs().max() <= allowed, (layout, rank, step + 1)
