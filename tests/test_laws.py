"""Pins the limit cases and conservation laws, on the library alone: no reference takes part."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD

from tests.cases import PERIODIC, Case
from tests.harness import run_ranks
from tests.reference import flat, mean
from tests.training import Trainer, trajectories, wrapped
from tests.workload import MakeOptimizers, adamw, gradient, nesterov_sgd, plain_sgd, ragged_model

STEPS = 10


def case(
    algorithm: str,
    optimizers: MakeOptimizers = nesterov_sgd,
    warmup_steps: int = 0,
    **arguments: object,
) -> Case:
    return Case(algorithm, arguments, warmup_steps, optimizers, torch.float64, STEPS)


def ddp_trajectory(optimizers: MakeOptimizers) -> list[Tensor]:
    """Plain DDP, with no hook."""
    model = wrapped(ragged_model(torch.float64))
    (optimizer,) = optimizers(model)
    steps = []
    for step in range(1, STEPS + 1):
        gradient(model, dist.get_rank(), step)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(flat(model.parameters()))
    return steps


def local_trajectory(optimizers: MakeOptimizers) -> list[Tensor]:
    """A worker that never hears of the others."""
    model = ragged_model(torch.float64)
    (optimizer,) = optimizers(model)
    steps = []
    for step in range(1, STEPS + 1):
        model.zero_grad()
        gradient(model, dist.get_rank(), step)
        optimizer.step()
        steps.append(flat(model.parameters()))
    return steps


def gap(a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]]) -> float:
    """The worst difference between two trajectories of all ranks."""
    pairs = [(x, y) for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True)]
    return max((x - y).abs().max().item() for x, y in pairs)


def run(*cases: Case, size: int = 3) -> list[list[list[Tensor]]]:
    """Each case's trajectories, by rank."""
    return [list(ranks) for ranks in zip(*run_ranks(trajectories, size, cases), strict=True)]


def test_all_reduce_is_ddp_bit_for_bit() -> None:
    for optimizers in (nesterov_sgd, adamw):
        (controlled,) = run(case("AllReduce", optimizers))
        assert gap(controlled, run_ranks(ddp_trajectory, 3, optimizers)) == 0.0


def test_tau_one_local_sgd_with_plain_sgd_is_ddp() -> None:
    (local,) = run(case("LocalSGD", plain_sgd, tau=1))
    assert gap(local, run_ranks(ddp_trajectory, 3, plain_sgd)) < 1e-14


def test_warm_up_is_ddp_bit_for_bit() -> None:
    ddp = run_ranks(ddp_trajectory, 3, adamw)
    warm = run(*(case(algorithm, adamw, warmup_steps=STEPS, tau=2) for algorithm in PERIODIC))
    assert [gap(each, ddp) for each in warm] == [0.0] * len(PERIODIC)


def test_alpha_zero_is_no_pull() -> None:
    alone = run_ranks(local_trajectory, 3, adamw)
    pulled, elastic = run(
        case("OverlapLocalSGD", adamw, tau=2, alpha=0.0, beta=0.5),
        case("EASGD", adamw, tau=2, alpha=0.0),
    )
    assert gap(pulled, alone) == 0.0
    assert gap(elastic, alone) == 0.0


def test_a_boundary_never_reached_is_no_averaging() -> None:
    alone = run_ranks(local_trajectory, 3, nesterov_sgd)
    never = run(*(case(algorithm, tau=STEPS + 1) for algorithm in PERIODIC))
    assert [gap(each, alone) for each in never] == [0.0] * len(PERIODIC)


def test_without_momentum_the_anchor_needs_no_special_case() -> None:
    """beta=0 keeps no momentum vector; a beta too small to matter goes the general way."""
    plain, general = run(
        case("OverlapLocalSGD", tau=2, beta=0.0), case("OverlapLocalSGD", tau=2, beta=1e-300)
    )
    assert gap(plain, general) < 1e-13


def test_bmuf_without_block_momentum_is_local_sgd() -> None:
    local, classical, nesterov = run(
        case("LocalSGD", tau=3),
        case("BMUF", tau=3, eta=0.0, zeta=1.0),
        case("BMUF", tau=3, eta=0.0, zeta=1.0, nesterov=True),
    )
    assert gap(classical, local) < 1e-13
    assert gap(nesterov, local) < 1e-13


def test_a_blend_with_weight_one_is_no_averaging() -> None:
    """The global model goes its way, and the local ones go theirs."""
    alone = run_ranks(local_trajectory, 3, nesterov_sgd)
    blended = run(*(case("DiLoCo", tau=3, fragments=2, delay=delay, alpha=1.0) for delay in (0, 2)))
    assert [gap(each, alone) for each in blended] == [0.0] * 2


def test_more_fragments_share_the_work_of_one() -> None:
    """Without delay a fragment's rounds know nothing of the others': tau=1 is the whole model."""
    whole, parts = run(case("DiLoCo", tau=1), case("DiLoCo", tau=1, fragments=3))
    assert gap(whole, parts) < 1e-14


def test_carried_rounds_preserve_the_mean_of_the_local_models() -> None:
    """An outer step of exactly the mean, carried over: as for CoCoD-SGD, fragment by fragment."""
    outer = partial(SGD, lr=1.0)
    each = case("DiLoCo", plain_sgd, tau=3, outer=outer, delay=2, fragments=2, merge="carry")
    alone = run_ranks(means_and_gradients, 3, [each])
    for step in range(1, STEPS):
        ranks = [seen[0] for seen in alone]
        mean_gradient = mean([seen[step][1] for seen in ranks])
        moved = mean([s[step][0] for s in ranks]) - mean([s[step - 1][0] for s in ranks])
        assert (moved + 0.05 * mean_gradient).abs().max() < 1e-14, f"step {step + 1}"


def test_defaults_that_depend_on_the_number_of_workers() -> None:
    easgd, named_easgd, bmuf, named_bmuf = run(
        case("EASGD", tau=2),
        case("EASGD", tau=2, alpha=0.9 / 3),
        case("BMUF", tau=2),
        case("BMUF", tau=2, eta=1 - 1 / 3),
    )
    assert gap(easgd, named_easgd) == 0.0
    assert gap(bmuf, named_bmuf) == 0.0


def test_averaging_preserves_the_mean_of_the_local_models() -> None:
    """Local SGD and CoCoD-SGD move workers, not their mean: it goes by the mean gradient alone."""
    cases = [case("LocalSGD", plain_sgd, tau=2), case("CoCoDSGD", plain_sgd, tau=2)]
    for each, *ranks in zip(cases, *run_ranks(means_and_gradients, 3, cases), strict=True):
        for step in range(1, STEPS):
            mean_gradient = mean([seen[step][1] for seen in ranks])
            moved = mean([s[step][0] for s in ranks]) - mean([s[step - 1][0] for s in ranks])
            assert (moved + 0.05 * mean_gradient).abs().max() < 1e-14, f"{each}, step {step + 1}"


def means_and_gradients(cases: Sequence[Case]) -> list[list[tuple[Tensor, Tensor]]]:
    """Each case's parameters after every step, and the local gradient of the step."""
    return [[_with_gradient(trainer) for _ in range(STEPS)] for trainer in map(Trainer, cases)]


def _with_gradient(trainer: Trainer) -> tuple[Tensor, Tensor]:
    trainer.steps += 1
    trainer.backward()
    gradients = flat(p.grad for p in trainer.model.parameters() if p.grad is not None)
    trainer.optimize()
    return trainer.x, gradients
