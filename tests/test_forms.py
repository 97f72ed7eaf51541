"""Pins that `register` and the bare `register_comm_hook` form give the same trajectory."""

import itertools

import pytest
import torch

import commhooks
from tests.cases import ALGORITHMS, Case, with_tau
from tests.expected import assert_ranks_follow
from tests.harness import run_ranks
from tests.training import trajectories
from tests.workload import adamw, nesterov_sgd, weights_and_biases


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_bare_form_follows_the_equations(algorithm: str, size: int) -> None:
    """`register` does so in test_trajectories; tau=1 has a boundary before the model is known."""
    cases = [
        Case(algorithm, arguments, warmup_steps, optimizers, torch.float64)
        for tau, warmup_steps, optimizers in itertools.product(
            [1, 3], [0, 3], [nesterov_sgd, weights_and_biases]
        )
        for arguments in with_tau(algorithm, tau)
    ]
    assert_ranks_follow(cases, run_ranks(trajectories, size, cases, "hook"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_both_forms_give_the_same_bits(algorithm: str) -> None:
    cases = [Case(algorithm, arguments, 2, adamw) for arguments in with_tau(algorithm, 2)]
    registered = run_ranks(trajectories, 2, cases, "register")
    bare = run_ranks(trajectories, 2, cases, "hook")
    for a, b in itertools.product(range(2), range(len(cases))):
        assert all(map(torch.equal, registered[a][b], bare[a][b]))


def test_the_hook_has_the_signature_that_ddp_and_lightning_want() -> None:
    assert commhooks.comm_hook.__name__ == "comm_hook"
    assert list(commhooks.comm_hook.__annotations__) == ["state", "bucket", "return"]
