"""Pins the reference itself to the laws that the papers state, so that it can judge the library."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.cases import ALGORITHMS, PERIODIC, Case, with_tau
from tests.expected import reference_trajectory
from tests.reference import mean
from tests.workload import adamw, nesterov_sgd, plain_sgd


def run(algorithm: str, size: int = 3, **others: object) -> list[list[Tensor]]:
    settings = {"dtype": torch.float64, "steps": 14, **others}
    return reference_trajectory(Case(algorithm, **settings), size)  # type: ignore[arg-type]


def same(a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]]) -> bool:
    return all(
        torch.allclose(x, y, rtol=0, atol=1e-13)
        for xs, ys in zip(a, b, strict=True)
        for x, y in zip(xs, ys, strict=True)
    )


def test_tau_one_local_sgd_is_ddp() -> None:
    local = run("LocalSGD", arguments={"tau": 1}, optimizers=plain_sgd)
    assert same(local, run("AllReduce", optimizers=plain_sgd))


def test_momentum_tells_local_sgd_from_ddp() -> None:
    """Else the law above would say nothing."""
    local = run("LocalSGD", arguments={"tau": 1}, optimizers=adamw)
    assert not same(local, run("AllReduce", optimizers=adamw))


def test_alpha_zero_is_no_pull() -> None:
    alone = run("OverlapLocalSGD", arguments={"tau": 100})
    pulled = run("OverlapLocalSGD", arguments={"tau": 2, "alpha": 0.0, "beta": 0.5})
    assert same(pulled, alone)


def test_bmuf_without_momentum_is_local_sgd() -> None:
    for nesterov in (False, True):
        arguments = {"tau": 3, "eta": 0.0, "zeta": 1.0, "nesterov": nesterov}
        assert same(run("BMUF", arguments=arguments), run("LocalSGD", arguments={"tau": 3}))


def test_one_worker_alone_is_plain_sgd() -> None:
    """m = 1: averaging is the identity, for those whose mean is x itself."""
    plain = run("AllReduce", size=1)
    for algorithm in ("LocalSGD", "CoCoDSGD"):
        assert same(run(algorithm, size=1, arguments={"tau": 2}), plain)


@pytest.mark.parametrize("algorithm", PERIODIC)
def test_workers_with_equal_data_stay_equal(algorithm: str) -> None:
    for arguments in with_tau(algorithm, 2):
        reference = Case(algorithm, arguments).reference()
        x: Sequence[Tensor] = [torch.tensor([1.0, 2.0])] * 3
        reference.start(x, {"a": x[0][:1], "b": x[0][1:]})
        for k in range(1, 9):
            x = reference.step(k, [xi + 1 for xi in x], torch.ones(2))
            assert all(torch.equal(xi, x[0]) for xi in x)


@pytest.mark.parametrize("algorithm", ["LocalSGD", "CoCoDSGD"])
def test_averaging_preserves_the_mean(algorithm: str) -> None:
    """Exact averaging moves workers, not their mean; CoCoD's mean moves by the same updates."""
    reference = Case(algorithm, {"tau": 1}).reference()
    generator = torch.Generator().manual_seed(0)
    x: Sequence[Tensor] = [torch.ones(4, dtype=torch.float64) for _ in range(3)]
    reference.start(x, {"w": x[0]})
    for k in range(1, 6):
        x = [xi + torch.randn(4, generator=generator, dtype=torch.float64) for xi in x]
        before = mean(x)
        x = reference.step(k, x, torch.ones(4))
        assert torch.allclose(mean(x), before, rtol=0, atol=1e-13)


def test_easgd_conserves_workers_plus_anchor() -> None:
    """The elastic force is symmetric: what the workers lose, the anchor gains."""
    reference = Case("EASGD", {"tau": 1, "alpha": 0.2}).reference()
    generator = torch.Generator().manual_seed(0)
    x: Sequence[Tensor] = [torch.zeros(4, dtype=torch.float64) for _ in range(3)]
    reference.start(x, {"w": x[0]})
    z = x[0]
    for k in range(1, 6):
        x = [xi + torch.randn(4, generator=generator, dtype=torch.float64) for xi in x]
        total = torch.stack(x).sum(dim=0) + z
        x = reference.step(k, x, torch.ones(4))
        z = reference.launched  # type: ignore[attr-defined]  # the anchor at the next boundary
        assert torch.allclose(torch.stack(list(x)).sum(dim=0) + z, total, rtol=0, atol=1e-13)


@pytest.mark.parametrize("algorithm", PERIODIC)
def test_nothing_is_averaged_between_boundaries(algorithm: str) -> None:
    for arguments in with_tau(algorithm, 50):
        assert same(run(algorithm, arguments=arguments), run("LocalSGD", arguments={"tau": 60}))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_warm_up_is_ddp(algorithm: str) -> None:
    for arguments in with_tau(algorithm, 2):
        warm = run(algorithm, arguments=arguments, warmup_steps=14, optimizers=nesterov_sgd)
        assert same(warm, run("AllReduce", optimizers=nesterov_sgd))
