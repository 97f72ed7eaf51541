"""Pins that workers in Lightning do not wait for one another, and that a signal stops them all."""

import os
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import commhooks
from tests.frameworks import ready_for_frameworks
from tests.harness import preload, run_ranks
from tests.heard import heard
from tests.works_with.test_lightning import build, build_module, loaders, saved_weights, weights

preload("tests.framework_imports")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("lightning"), reason="needs the extra frameworks"),
]

EPOCHS = 30
"""180 batches."""


def counted(folder: Path) -> tuple[int, list[str]]:
    ready_for_frameworks()
    from commhooks.lightning import Consensus

    state = commhooks.OverlapLocalSGD(tau=4)
    with heard() as lines:
        build(folder, Consensus(state), max_epochs=10).fit(build_module(), loaders()[0])
    told = [line for line in lines if "outside commhooks" in line]
    return state.stats.foreign_collectives, told


def test_lightning_sends_nothing_between_steps(tmp_path: Path) -> None:
    for sent, told in run_ranks(counted, 2, tmp_path, tidy=False):
        assert sent == 0
        assert told == []


def registered_by_hand(folder: Path) -> list[str]:
    ready_for_frameworks()
    from lightning import Callback

    state = commhooks.OverlapLocalSGD(tau=4)

    class ByHand(Callback):
        def on_fit_start(self, trainer: Any, module: Any) -> None:
            state.register(trainer.strategy.model, *trainer.optimizers)

    with heard() as lines:
        build(folder, ByHand(), max_epochs=10).fit(build_module(), loaders()[0])
    state.finish()
    return [line for line in lines if "outside commhooks" in line]


def test_without_the_callback_lightning_is_named(tmp_path: Path) -> None:
    (told,), others = run_ranks(registered_by_hand, 2, tmp_path, tidy=False)
    assert "Lightning asks for SIGTERM before every batch" in told
    assert others == []


def stopped(folder: Path, told: tuple[int, ...], at: tuple[int, ...]) -> dict[str, Any]:
    """``told`` ranks get a SIGTERM, each before a batch of its own."""
    ready_for_frameworks()
    from lightning import Callback
    from lightning.pytorch.callbacks import OnExceptionCheckpoint
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from commhooks.lightning import Consensus

    rank = dist.get_rank()

    class Signal(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if rank in told and trainer.global_step == at[told.index(rank)]:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    state = commhooks.OverlapLocalSGD(tau=4)
    module = build_module()
    saver = OnExceptionCheckpoint(folder)
    callbacks = [Signal(), saver, Consensus(state)]
    trainer = build(folder, *callbacks, max_epochs=EPOCHS, enable_checkpointing=True)
    ended = False
    try:
        trainer.fit(module, loaders()[0])
    except SIGTERMException:
        ended = True
    dist.barrier()
    return {
        "ended": ended,
        "step": trainer.global_step,
        "received": trainer.received_sigterm,
        "restored": signal.getsignal(signal.SIGTERM) == before,
        "weights": weights(module),
        "saved": saved_weights(folder / "on_exception.ckpt") if ended else torch.empty(0),
    }


@pytest.mark.parametrize(
    ("told", "at"), [((1,), (10,)), ((0,), (10,)), ((0, 1, 2), (40, 33, 50))], ids=str
)
def test_a_signal_stops_all_ranks_before_the_same_batch(
    tmp_path: Path, told: tuple[int, ...], at: tuple[int, ...]
) -> None:
    ends = run_ranks(stopped, 3, tmp_path, told, at, tidy=False)
    consensus: Tensor = ends[0]["weights"]
    for end in ends:
        assert end["ended"]
        assert end["received"]
        assert end["restored"]
        assert min(at) < end["step"] == ends[0]["step"] <= min(at) + 64
        assert torch.equal(end["weights"], consensus)
        assert torch.equal(end["saved"], consensus)


def test_a_signal_in_the_last_batches_does_not_stand_in_the_way(tmp_path: Path) -> None:
    for end in run_ranks(stopped, 2, tmp_path, (1,), (140,), tidy=False):
        assert not end["ended"]
        assert end["step"] == 6 * EPOCHS
