"""Pins state.stats: what it counts, in which units, and the distance to the consensus."""

import dataclasses
import gc
import time

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhooks
from tests.cases import ALGORITHMS, OVERLAPPED, PERIODIC, Case, one_case
from tests.golden import made_up_gradient, unit_sgd, weight
from tests.harness import run_ranks
from tests.training import Trainer

PARAMETERS = 35 + 7 + 21 + 3


def stats_after_every_step(case: Case) -> list[commhooks.Stats]:
    trainer = Trainer(case)
    seen = [trainer.state.stats]
    for _ in range(case.steps):
        trainer.step()
        seen.append(trainer.state.stats)
    trainer.state.finish()
    return [*seen, trainer.state.stats]


def test_stats_are_plain_and_frozen() -> None:
    stats = commhooks.LocalSGD(tau=2).stats
    assert stats == commhooks.Stats(0, 0, 0, 0, 0.0, 0.0, 0.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.step = 1  # type: ignore[misc]


@pytest.mark.parametrize("algorithm", PERIODIC)
def test_steps_and_rounds(algorithm: str) -> None:
    """Two steps of warm-up, then boundaries at 5, 8, 11."""
    case = one_case(algorithm, 3, warmup_steps=2, steps=12)
    for seen in run_ranks(stats_after_every_step, 2, case):
        assert [stats.step for stats in seen[:-1]] == list(range(13))
        rounds = [stats.rounds_launched for stats in seen]
        assert rounds == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert seen[-1].rounds_completed == 3
        for stats in seen:
            assert 0 <= stats.rounds_launched - stats.rounds_completed <= 1


@pytest.mark.parametrize("algorithm", PERIODIC)
def test_a_round_sends_the_model_once(algorithm: str) -> None:
    """Gradients in warm-up, parameters afterwards: each step or round, one model's bytes and
    nothing that grows with the model besides."""
    case = one_case(algorithm, 3, warmup_steps=2, steps=8)
    model = PARAMETERS * 4
    for seen in run_ranks(stats_after_every_step, 2, case):
        sent = [stats.bytes_reduced for stats in seen]
        assert sent[:3] == [0, model, 2 * model]
        assert sent[4] == 2 * model
        assert 3 * model <= sent[5] < 4 * model
        assert sent[7] == sent[5]
        assert 4 * model <= sent[8] < 5 * model


def test_all_reduce_sends_the_gradients_at_every_step() -> None:
    for seen in run_ranks(stats_after_every_step, 2, Case("AllReduce", steps=5)):
        sent = [stats.bytes_reduced for stats in seen]
        assert sent[:6] == [PARAMETERS * 4 * step for step in range(6)]
        assert seen[-1].rounds_launched == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_seconds_only_grow(algorithm: str) -> None:
    case = one_case(algorithm, 2)
    for seen in run_ranks(stats_after_every_step, 2, case):
        exposed = [stats.seconds_exposed for stats in seen]
        hidden = [stats.seconds_hidden for stats in seen]
        assert exposed == sorted(exposed)
        assert hidden == sorted(hidden)
        assert exposed[0] == hidden[0] == 0.0
        assert exposed[-1] > 0.0


def arrived_and_evaluated(case: Case) -> list[commhooks.Stats]:
    """When the round has arrived, and when an evaluation has waited for it."""
    trainer = Trainer(case)
    trainer.step()
    deadline = time.monotonic() + 60
    while trainer.state.stats.rounds_completed < 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    seen = [trainer.state.stats]
    trainer.state.state_dict()
    return [*seen, trainer.state.stats]


@pytest.mark.parametrize("algorithm", OVERLAPPED)
def test_a_round_that_has_arrived_counts_as_hidden_whoever_waits_for_it(algorithm: str) -> None:
    for arrived, waited in run_ranks(arrived_and_evaluated, 2, one_case(algorithm, 1)):
        assert arrived.rounds_completed == waited.rounds_completed == 1
        assert arrived.seconds_hidden == waited.seconds_hidden > 0.0


@pytest.mark.parametrize(
    ("algorithm", "arguments", "expected"),
    [
        # rank 0 at 2, 6, 10 and rank 1 at 6, 10, 14; drawn to their mean 4, 8, 12
        ("LocalSGD", {"tau": 2}, [2, 2, 2, 2, 2]),
        # rank 0 at 2, 3, 4.5; drawn to z = 0, 2, 4, as in the golden run
        ("OverlapLocalSGD", {"tau": 2, "alpha": 0.5}, [2, 2, 1, 1, 0.5]),
    ],
)
def test_the_distance_is_to_what_the_models_were_drawn_to(
    algorithm: str, arguments: dict[str, float], expected: list[float]
) -> None:
    case = Case(
        algorithm,
        arguments,
        model=weight,
        optimizers=unit_sgd,
        backward=made_up_gradient,
        dtype=torch.float64,
        steps=6,
    )
    first, _ = run_ranks(stats_after_every_step, 2, case)
    assert [stats.consensus_distance for stats in first[:2]] == [0.0, 0.0]
    assert [stats.consensus_distance for stats in first[2:7]] == expected


def large_storages() -> list[int]:
    """How many tensors of the model's size Python holds, after a step of warm-up and after more."""
    model = DistributedDataParallel(nn.Linear(300, 300, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = commhooks.LocalSGD(tau=2, warmup_steps=1)
    state.register(model, optimizer)
    counts = []
    for _ in range(4):
        torch.autograd.backward(model(torch.ones(1, 300)).sum())
        optimizer.step()
        gc.collect()
        held = (each for each in gc.get_objects() if isinstance(each, torch.Tensor))
        large = {each.untyped_storage().data_ptr() for each in held if each.numel() >= 90_000}
        counts.append(len(large))
    return counts


def test_gradients_of_warm_up_are_not_kept() -> None:
    """DDP makes new buckets after the first backward, and gives back the old ones."""
    for counts in run_ranks(large_storages, 2):
        # The weight, its gradient and DDP's bucket; then the wire and a chunk's scratch, too.
        assert counts == [3, 5, 5, 5]


def figures_at_the_end(case: Case) -> list[dict[str, float]]:
    """Those that come with a round: before finish(), behind it, resumed, and behind a next one."""
    names = ("relative_drift", "agreement", "step_seconds", "round_seconds", "loss", "first_loss")
    trainer = Trainer(case)
    for step in range(case.steps):
        trainer.state.observe(1.0 + step)
        trainer.step()
    trainer.state.state_dict()  # waits for the last round
    seen = [trainer.state.stats]
    trainer.state.finish()
    seen.append(trainer.state.stats)
    resumed = Trainer(case)
    resumed.go_on(trainer.saved(), trainer.steps)
    seen.append(resumed.state.stats)
    trainer.step()
    trainer.state.disable()
    seen.append(trainer.state.stats)
    trainer.state.close()
    seen.append(trainer.state.stats)
    return [{name: getattr(stats, name) for name in names} for stats in seen]


@pytest.mark.parametrize("algorithm", ["LocalSGD", "OverlapLocalSGD", "DiLoCo"])
def test_the_last_figures_stay(algorithm: str) -> None:
    """What a run prints at its end, behind finish(), is what was measured last."""
    first, other = run_ranks(figures_at_the_end, 2, one_case(algorithm, 3, steps=7))
    assert first == other
    before, *after = first
    assert all(before.values())
    assert after == [before] * 4
