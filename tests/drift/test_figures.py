"""Pins relative drift and agreement against their definition, from every worker's parameters."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import commhooks
from commhooks.engine.rounds import drift as drift_module
from tests.cases import Case
from tests.harness import run_ranks
from tests.reference import flat
from tests.training import attach, make_state, wrapped
from tests.workload import trained

TAU, ROUNDS = 3, 4

# What the workers have in common after a round, from z before it and all x before the launch.
Next = Callable[[Tensor, Tensor], Tensor]

CASES: dict[str, tuple[dict[str, Any], Next]] = {
    "LocalSGD": ({}, lambda z, x: x.mean(0)),
    "OverlapLocalSGD": ({"alpha": 0.6}, lambda z, x: 0.4 * x.mean(0) + 0.6 * z),
    "EASGD": ({"alpha": 0.2}, lambda z, x: z + 0.2 * (x - z).sum(0)),
    "SlowMo": ({"beta": 0.0, "lr": 0.5}, lambda z, x: z - 0.5 * (z - x.mean(0))),
    "DiLoCo": (
        {"outer": partial(torch.optim.SGD, lr=0.7)},
        lambda z, x: z + 0.7 * (x - z).mean(0),
    ),
}


def case_of(algorithm: str, **settings: Any) -> Case:
    arguments = {"tau": TAU, **CASES[algorithm][0]}
    return Case(algorithm, arguments, dtype=torch.float64, steps=TAU * ROUNDS, **settings)


class Run(NamedTuple):
    """Parameters at the start and of every worker before each launch, and the stats after it."""

    start: Tensor
    launches: list[Tensor]
    stats: list[commhooks.Stats]


def run(case: Case) -> Run:
    """Train, and look at the parameters between the optimizer's update and the boundary."""
    model = wrapped(case.model(case.dtype))
    optimizers = case.optimizers(model)
    start = flat(trained(model))
    before: list[Tensor] = []
    # Ahead of the state's own hook.
    optimizers[-1].register_step_post_hook(lambda *_: before.append(flat(trained(model))))
    state = make_state(case)
    attach(state, model, optimizers)
    seen = Run(start, [], [])
    for step in range(1, case.steps + 1):
        case.backward(model, dist.get_rank(), step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % TAU == 0:
            everyone = [torch.empty_like(start) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, before[-1])
            seen.launches.append(torch.stack(everyone))
            state.state_dict()  # waits for the round
            seen.stats.append(state.stats)
    return seen


def expected(seen: Run, following: Next) -> list[tuple[float, float]]:
    """Relative drift and agreement at every launch."""
    z, found = seen.start, []
    for x in seen.launches:
        moves = x - z
        norms = moves.norm(dim=1)
        drift = math.sqrt(norms.square().mean().item()) / z.norm().item()
        found.append((drift, (moves.mean(0).norm() / norms.mean()).item()))
        z = following(z, x)
    return found


@pytest.mark.parametrize("algorithm", CASES)
@pytest.mark.parametrize("m", [1, 2, 3])
def test_figures_are_the_definition_s(algorithm: str, m: int) -> None:
    seen = run_ranks(run, m, case_of(algorithm))
    assert len({repr(each.stats[-1].relative_drift) for each in seen}) == 1
    assert len({repr(each.stats[-1].agreement) for each in seen}) == 1
    wanted = expected(seen[0], CASES[algorithm][1])
    for stats, (drift, agreement) in zip(seen[0].stats, wanted, strict=True):
        assert stats.relative_drift == pytest.approx(drift, rel=1e-9)
        assert stats.agreement == pytest.approx(agreement, rel=1e-9)
        assert stats.tau == TAU


@pytest.mark.parametrize("algorithm", ["OverlapLocalSGD", "DiLoCo"])
def test_islands_tell_the_whole_model_s_figures(algorithm: str) -> None:
    """The agreement comes a round later there."""
    seen = run_ranks(run, 4, case_of(algorithm, island=2))
    one_a_worker = seen[0]._replace(launches=[x[::2] for x in seen[0].launches])
    wanted = expected(one_a_worker, CASES[algorithm][1])
    for each in seen:
        for stats, (drift, _) in zip(each.stats, wanted, strict=True):
            assert stats.relative_drift == pytest.approx(drift, rel=1e-9)
        for stats, (_, agreement) in zip(each.stats[1:], wanted, strict=False):
            assert stats.agreement == pytest.approx(agreement, rel=1e-9)


def of_a_large_model(sample: int) -> Run:
    drift_module._LOOKED_AT = sample
    return run(case_of("OverlapLocalSGD"))


def test_a_sample_of_a_large_model_is_near() -> None:
    """Here every third number is looked at, of a model where they are few."""
    (seen, _), (all_of_it, _) = (run_ranks(of_a_large_model, 2, n) for n in (22, 10_000))
    for stats, whole in zip(seen.stats, all_of_it.stats, strict=True):
        assert stats.relative_drift != whole.relative_drift
        assert stats.relative_drift == pytest.approx(whole.relative_drift, rel=0.5)
        assert stats.agreement == pytest.approx(whole.agreement, rel=0.5)
        # Nearer than the square root of three, by which a sample's norm is too small.
        assert stats.consensus_distance != whole.consensus_distance
        assert stats.consensus_distance == pytest.approx(whole.consensus_distance, rel=0.35)


@pytest.mark.parametrize("numel", [1, 2**16, 2**16 + 1, 10**6, 124 * 10**6])
def test_every_k_th_number_is_enough(numel: int) -> None:
    k = drift_module.stride_for(numel)
    assert k % 2 == 1
    assert numel / k <= 2**16
    assert (k == 1) == (numel <= 2**16)


class Table(NamedTuple):
    """Of one rank: its parameters at the last boundary and when it asks, and what it is told."""

    z: list[Tensor]
    x: list[Tensor]
    rows: commhooks.drift.DriftTable
    text: str


def table(case: Case) -> Table:
    model = wrapped(case.model(case.dtype))
    optimizers = case.optimizers(model)
    state = make_state(case)
    attach(state, model, optimizers)
    at_boundary: list[Tensor] = []
    for step in range(1, TAU + 3):
        case.backward(model, dist.get_rank(), step)
        optimizers[0].step()
        optimizers[0].zero_grad()
        if step == TAU:
            at_boundary = [p.detach().clone() for p in model.parameters()]
    rows = state.drift()
    return Table(at_boundary, [p.detach() for p in model.parameters()], rows, str(rows))


@pytest.mark.parametrize(("m", "island"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_table_of_parameters(m: int, island: int) -> None:
    """Of Local SGD, whose workers have the same model right after a boundary."""
    ranks = run_ranks(table, m, case_of("LocalSGD", island=island))
    rows = ranks[0].rows
    assert all(rank.rows == rows for rank in ranks)
    assert list(rows) == sorted(rows, key=lambda row: -row.relative_drift)
    assert ranks[0].text.splitlines()[1].startswith(rows[0].name)
    names = [name for name, _ in case_of("LocalSGD").model(torch.float64).named_parameters()]
    assert sorted(row.name for row in rows) == sorted(names)
    told = {row.name: row for row in rows}
    for name, z, *x in zip(names, ranks[0].z, *(rank.x for rank in ranks[::island]), strict=True):
        moves = torch.stack(x) - z
        norms = moves.flatten(1).norm(dim=1)
        distance = norms.square().mean().sqrt().item()
        row = told[name]
        assert row.norm == pytest.approx(z.norm().item(), rel=1e-9)
        assert row.distance == pytest.approx(distance, rel=1e-9)
        assert row.relative_drift == pytest.approx(distance / z.norm().item(), rel=1e-9)
        together = (moves.mean(0).norm() / norms.mean()).item()
        assert row.agreement == pytest.approx(together, rel=1e-9)
