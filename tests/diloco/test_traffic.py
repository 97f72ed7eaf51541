"""Pins what a rank sends in a step: a fragment at a time, whatever the number of fragments."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from tests.cases import Case
from tests.harness import run_ranks
from tests.training import Trainer
from tests.workload import initialise, plain_sgd


def equal_layers(dtype: torch.dtype) -> nn.Module:
    """Twelve layers of 30 numbers, and one of 18."""
    layers = [layer for _ in range(12) for layer in (nn.Linear(5, 5), nn.Tanh())]
    return initialise(nn.Sequential(*layers, nn.Linear(5, 3))).to(dtype)


NUMBERS = 12 * 30 + 18


def bytes_of_every_step(cases: Sequence[Case]) -> list[list[int]]:
    runs = []
    for case in cases:
        trainer = Trainer(case)
        before, sent = 0, []
        for _ in range(case.steps):
            trainer.step()
            now = trainer.state.stats.bytes_reduced
            sent.append(now - before)
            before = now
        trainer.state.finish()
        runs.append(sent)
    return runs


@pytest.mark.parametrize("delay", [0, 2, 8])
def test_four_fragments_send_a_quarter_at_a_time(delay: int) -> None:
    todo = [
        Case(
            "DiLoCo",
            {"tau": 8, "fragments": fragments, "delay": delay},
            optimizers=plain_sgd,
            model=equal_layers,
            steps=24,
        )
        for fragments in (1, 4)
    ]
    for whole, parts in run_ranks(bytes_of_every_step, 2, todo):
        assert max(whole) >= 4 * NUMBERS
        assert max(parts) <= 0.3 * max(whole)
        # In every period of tau steps the whole model, and nothing besides that grows with it.
        for sent in (whole, parts):
            assert 4 * NUMBERS <= sum(sent[8:16]) < 1.1 * 4 * NUMBERS
