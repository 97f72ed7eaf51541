"""Pins that Accelerate's way of reading an IterableDataset is named, and that its remedy holds."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, IterableDataset

import commhooks
from tests.accelerated import rank_environment
from tests.harness import run_ranks
from tests.heard import heard
from tests.workload import ragged_model, seeded

BATCHES = 45


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        generator = seeded(3)
        for _ in range(2 * 4 * BATCHES):
            yield torch.randn(5, generator=generator)


def streamed(dispatch: bool | None) -> tuple[int, int, list[str]]:
    rank_environment()
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch)
    )
    model = ragged_model()
    model, optimizer, loader = accelerator.prepare(
        model, SGD(model.parameters(), lr=0.05), DataLoader(Stream(), batch_size=4)
    )
    state = commhooks.OverlapLocalSGD(tau=4)
    with heard() as lines:
        state.register(model, optimizer)
        for x in loader:
            assert len(x) == 4
            accelerator.backward(nn.functional.mse_loss(model(x), x[:, :3]))
            optimizer.step()
            optimizer.zero_grad()
        sent = state.stats.foreign_collectives
        state.finish()
    told = [line for line in lines if "outside commhooks" in line]
    return state.stats.step, sent, told


@pytest.mark.slow
def test_batches_that_rank_0_reads_for_all() -> None:
    (steps, sent, told), (_, _, others) = run_ranks(streamed, 2, None)
    assert steps == BATCHES
    assert sent > BATCHES
    assert len(told) == 1
    assert "Accelerate reads every batch on rank 0" in told[0]
    assert "DataLoaderConfiguration(dispatch_batches=False, split_batches=...)" in told[0]
    assert others == []


@pytest.mark.slow
def test_batches_that_every_rank_reads() -> None:
    for steps, sent, told in run_ranks(streamed, 2, False):
        assert steps == BATCHES
        # Accelerate lets the ranks agree on a generator's state where an epoch begins.
        assert sent <= 2
        assert told == []
