"""Pins buffers: never broadcast while training, averaged in the consensus, put back after it."""

import logging

import pytest
import torch
from torch import Tensor, nn

from tests.cases import PERIODIC, Case, with_tau
from tests.collectives import counted_collectives
from tests.harness import run_ranks
from tests.reference import flat, mean
from tests.training import Form, Trainer
from tests.workload import gradient, initialise, plain_sgd

STEPS = 7


def normalised(dtype: torch.dtype) -> nn.Module:
    return initialise(
        nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3, bias=False))
    ).to(dtype)


def never_averaged(algorithm: str, **settings: int) -> Case:
    """A boundary that lies beyond the end: workers that train alone."""
    (arguments, *_) = with_tau(algorithm, 100)
    return Case(algorithm, arguments, optimizers=plain_sgd, model=normalised, **settings)  # type: ignore[arg-type]


def buffers(model: nn.Module) -> Tensor:
    return flat(b for b in model.buffers() if b.is_floating_point())


def counters(model: nn.Module) -> Tensor:
    return flat(b for b in model.buffers() if not b.is_floating_point())


def buffers_while_training(case: Case, form: Form) -> list[tuple[Tensor, Tensor]]:
    """After every step, this rank's statistics and those of the same worker training alone."""
    trainer = Trainer(case, form)
    alone = case.model(case.dtype)
    (optimizer,) = case.optimizers(alone)
    seen = []
    for step in range(1, STEPS + 1):
        trainer.step()
        alone.zero_grad()
        gradient(alone, trainer.rank, step)
        optimizer.step()
        seen.append((buffers(trainer.model), buffers(alone)))
    return seen


@pytest.mark.parametrize("form", ["register", "hook"])
@pytest.mark.parametrize("algorithm", PERIODIC)
def test_statistics_stay_local_while_training(algorithm: str, form: Form) -> None:
    ranks = run_ranks(buffers_while_training, 2, never_averaged(algorithm), form)
    for seen in ranks:
        assert all(torch.allclose(mine, alone, rtol=0, atol=1e-6) for mine, alone in seen)
    assert not torch.equal(ranks[0][-1][0], ranks[1][-1][0])


def broadcasts_while_training(form: Form) -> int:
    trainer = Trainer(never_averaged("OverlapLocalSGD"), form)
    trainer.step()
    trainer.step()  # DDP agrees on its buckets once, by a broadcast
    with counted_collectives() as collectives:
        for _ in range(5):
            trainer.step()
    return sum(collectives.values())


@pytest.mark.parametrize("form", ["register", "hook"])
def test_no_forward_broadcasts_buffers(form: Form) -> None:
    assert run_ranks(broadcasts_while_training, 2, form) == [0, 0]


def buffers_around_consensus(form: Form) -> dict[str, Tensor]:
    trainer = Trainer(Case("LocalSGD", {"tau": 3}, model=normalised), form)
    for _ in range(4):
        trainer.step()
    before, counted = buffers(trainer.model), counters(trainer.model)
    with trainer.state.averaged():
        inside = buffers(trainer.model)
        with torch.no_grad():  # statistics that a forward in training mode would have changed
            trainer.model(torch.ones(2, 5))
    after, still_counted = buffers(trainer.model), counters(trainer.model)
    trainer.state.finish()
    finished = buffers(trainer.model)
    return {
        "before": before,
        "inside": inside,
        "after": after,
        "finished": finished,
        "counted": counted,
        "still counted": still_counted,
    }


@pytest.mark.parametrize("form", ["register", "hook"])
def test_statistics_are_averaged_in_the_consensus(form: Form) -> None:
    ranks = run_ranks(buffers_around_consensus, 3, form)
    expected = mean([seen["before"] for seen in ranks])
    for seen in ranks:
        assert torch.allclose(seen["inside"], expected, rtol=0, atol=1e-6)
        assert torch.equal(seen["after"], seen["before"])
        assert torch.equal(seen["finished"], ranks[0]["finished"])
        assert torch.allclose(seen["finished"], expected, rtol=0, atol=1e-6)


def in_warm_up(form: Form) -> tuple[Tensor, Tensor]:
    """Parameters are equal in warm-up, statistics are not."""
    trainer = Trainer(never_averaged("EASGD", warmup_steps=50), form)
    for _ in range(3):
        trainer.step()
    before = buffers(trainer.model)
    with trainer.state.averaged():
        return before, buffers(trainer.model)


@pytest.mark.parametrize("form", ["register", "hook"])
def test_statistics_are_averaged_in_warm_up_too(form: Form) -> None:
    ranks = run_ranks(in_warm_up, 2, form)
    expected = mean([before for before, _ in ranks])
    assert all(torch.allclose(inside, expected, rtol=0, atol=1e-6) for _, inside in ranks)
    assert not torch.equal(ranks[0][0], ranks[1][0])


def buffers_after_the_block(case: Case) -> bool:
    """A forward in training mode inside the block, where nothing had to be averaged."""
    trainer = Trainer(case)
    trainer.step()
    before = buffers(trainer.model)
    with trainer.state.averaged():
        trainer.model.module(torch.ones(2, 5))
        assert not torch.equal(buffers(trainer.model), before)
    return torch.equal(buffers(trainer.model), before)


@pytest.mark.parametrize("size", [1, 2])
def test_statistics_are_put_back_where_nothing_was_averaged(size: int) -> None:
    case = Case("LocalSGD", {"tau": 3}, warmup_steps=5, model=normalised)
    assert run_ranks(buffers_after_the_block, size, case) == [True] * size


class Masked(nn.Module):
    """With a causal mask, the largest finite number, and a buffer that DDP is told to ignore."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        self.register_buffer("least", torch.full((2,), torch.finfo(torch.float32).min))
        self.register_buffer("mine", torch.zeros(2))
        self._ddp_params_and_buffers_to_ignore = ["mine"]

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layer(x)
        return scores


def masked(dtype: torch.dtype) -> nn.Module:
    return initialise(Masked()).to(dtype)


def special_buffers(case: Case) -> dict[str, Tensor]:
    trainer = Trainer(case)
    trainer.model.module.get_buffer("mine").fill_(float(trainer.rank))
    trainer.step()
    trainer.step()
    trainer.state.finish()
    return dict(trainer.model.module.named_buffers())


def test_buffers_that_are_no_statistics() -> None:
    """An infinite one is no broken parameter; their mean is the number that all ranks have."""
    before = Masked()
    case = Case("OverlapLocalSGD", {"tau": 1}, model=masked)
    for rank, after in enumerate(run_ranks(special_buffers, 2, case)):
        assert torch.equal(after["mask"], before.get_buffer("mask"))
        assert torch.equal(after["least"], before.get_buffer("least"))
        assert torch.equal(after["mine"], torch.full((2,), float(rank)))


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def logged_messages(form: Form) -> list[str]:
    messages = Messages()
    logger = logging.getLogger("commhooks")
    logger.addHandler(messages)
    logger.setLevel(logging.INFO)
    trainer = Trainer(never_averaged("LocalSGD"), form)
    for _ in range(4):
        trainer.step()
    return [text for text in messages.texts if "buffers" in text]


@pytest.mark.parametrize("form", ["register", "hook"])
def test_switching_the_broadcast_off_is_logged_once(form: Form) -> None:
    for texts in run_ranks(logged_messages, 2, form):
        assert len(texts) == 1
