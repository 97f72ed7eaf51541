"""Pins that a failed run leaves nothing behind once its objects are gone."""

import contextlib

import torch

import commhooks
from tests.cases import Case
from tests.harness import run_ranks
from tests.training import Trainer
from tests.workload import trained


def fail_and_let_go() -> None:
    """The harness fails this task if threads or sockets outlive its process group."""
    trainer = Trainer(Case("LocalSGD", {"tau": 2}))
    with torch.no_grad():
        next(iter(trained(trainer.model))).fill_(float("nan"))
    with contextlib.suppress(commhooks.RoundError):
        for _ in range(2):
            trainer.step()


def test_a_failed_state_lets_go_of_its_group() -> None:
    run_ranks(fail_and_let_go, 2)
