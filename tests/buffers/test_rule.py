"""Pins the rule for buffers: statistics are averaged, the rest is the first rank's or one's own.

The first rank's is what plain DDP would have broadcast.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import commhooks
from tests.buffers.holder import assert_holds, consensus, content, fill, held, holder, own, spoil
from tests.cases import Case
from tests.harness import rank_outcomes, run_ranks
from tests.training import Form, Trainer


def every_kind(cases: Sequence[Case], form: Form) -> None:
    """Inside averaged(), after it, after finish(), and in training that goes on."""
    for case in cases:
        trainer = Trainer(case, form)
        module, size = trainer.model.module, dist.get_world_size()
        trainer.step()
        fill(module, trainer.rank)
        mine = {name: value for name, value in held(module).items() if not own(name)}
        trainer.step()
        assert_holds(module, content(trainer.rank), "training")
        for _ in range(2):
            with trainer.state.averaged():
                assert_holds(module, consensus(trainer.rank, size), f"{case}: averaged()")
                spoil(module)
            assert_holds(module, mine, "put back")
        fill(module, trainer.rank)
        trainer.state.finish()
        assert_holds(module, consensus(trainer.rank, size), f"{case}: finish()")
        trainer.step()


CASES = [
    Case("LocalSGD", {"tau": 2}, model=holder),
    Case("OverlapLocalSGD", {"tau": 2}, model=holder),
    Case("EASGD", {"tau": 2}, model=holder, warmup_steps=5),
    Case("AllReduce", model=holder),
]


@pytest.mark.parametrize("form", ["register", "hook"])
def test_every_kind_of_buffer(form: Form) -> None:
    """Three ranks, since a constant is not three times a third of itself."""
    run_ranks(every_kind, 3, CASES, form)


# Caches that come and go.


class Rotary(nn.Module):
    """A table that grows with the longest input seen, as rotary embeddings have it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("cache", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > len(self.get_buffer("cache")):
            self.cache = torch.arange(float(len(x)))
        y: Tensor = self.layer(x)
        return y


def rotary(dtype: torch.dtype) -> nn.Module:
    return Rotary()


def caches(cases: Sequence[Case], form: Form) -> list[Tensor]:
    """The cache grows on the last rank, then on all under inference mode inside the block."""
    ends = []
    for case in cases:
        trainer = Trainer(case, form)
        trainer.step()
        if trainer.rank == dist.get_world_size() - 1:
            trainer.model.module(torch.zeros(9, 5))
        for rows in (1, 20 + trainer.rank, 30):
            with torch.inference_mode(), trainer.state.averaged():
                trainer.model.module(torch.zeros(rows, 5))
            trainer.step()
        trainer.state.finish()
        ends.append(trainer.x)
    return ends


@pytest.mark.parametrize("form", ["register", "hook"])
def test_a_cache_that_differs_between_ranks_disturbs_nobody(form: Form) -> None:
    """Sent by position, its sizes differed and the backend aborted the process."""
    cases = [Case(name, {"tau": 2}, model=rotary) for name in ("LocalSGD", "CoCoDSGD")]
    first, *others = run_ranks(caches, 3, cases, form)
    assert all(torch.equal(a, b) for x in others for a, b in zip(first, x, strict=True))


# What ranks do not have in common.


class Named(nn.Module):
    """Buffers that are registered in the other order on odd ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        names = [("low", 1.0), ("high", 100.0), ("mean", 7.0)]
        for name, value in reversed(names) if dist.get_rank() % 2 else names:
            self.register_buffer(name, torch.tensor([value]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def named(dtype: torch.dtype) -> nn.Module:
    return Named()


def other_order(options: dict[str, Any]) -> list[float]:
    trainer = Trainer(Case("LocalSGD", {"tau": 2}, model=named), **options)
    trainer.step()
    module = trainer.model.module
    for name, value in (("low", 1.0), ("high", 100.0), ("mean", 6.0 + trainer.rank)):
        module.get_buffer(name).fill_(value)
    with trainer.state.averaged():
        return [module.get_buffer(name).item() for name in ("low", "high", "mean")]


@pytest.mark.parametrize(("options", "mean"), [({}, 6.0), ({"average_buffers": ["mean"]}, 7.0)])
def test_buffers_are_matched_by_name(options: dict[str, Any], mean: float) -> None:
    """Matched by position, 1 and 100 both became 50.5."""
    assert run_ranks(other_order, 3, options) == [[1.0, 100.0, mean]] * 3


def longer(module: nn.Module) -> None:
    module.low = torch.ones(2)


def of_another_dtype(module: nn.Module) -> None:
    module.low = torch.ones(1, dtype=torch.float64)


def one_more(module: nn.Module) -> None:
    module.register_buffer("more", torch.ones(1))


def statistics_longer(module: nn.Module) -> None:
    module.register_buffer("running_mean", torch.zeros(1 + dist.get_rank()))


Change = Callable[[nn.Module], None]


def refused_then_mended(changes: Sequence[tuple[Change, str]], algorithms: Sequence[str]) -> None:
    """Rank 1 alone changes a buffer; averaged() and finish() are refused until it is undone."""
    for algorithm in algorithms:
        arguments = {} if algorithm == "AllReduce" else {"tau": 2}
        for change, name in changes:
            trainer = Trainer(Case(algorithm, arguments, model=named))
            trainer.step()
            module = trainer.model.module
            kept = dict(module._buffers)
            if trainer.rank == 1:
                change(module)
            x, buffers = trainer.x, [b.clone() for b in module.buffers()]
            for use in (trainer.state.finish, trainer.state.averaged().__enter__):
                with pytest.raises(commhooks.RoundError, match=name):
                    use()
                assert torch.equal(trainer.x, x)
                assert all(map(torch.equal, module.buffers(), buffers))
            module._buffers.clear()
            module._buffers.update(kept)
            trainer.step()
            with trainer.state.averaged():
                pass
            trainer.state.finish()


def test_persistent_buffers_that_differ_are_named_on_every_rank() -> None:
    """Compared before a byte of them is sent; the state stays usable."""
    changes = [(longer, "low"), (of_another_dtype, "low"), (one_more, "more")]
    run_ranks(refused_then_mended, 3, changes, ["LocalSGD", "EASGD", "AllReduce"])


# What a user names.


def user_named(form: Form) -> None:
    """A name, a pattern over several modules, and formats that a mean has to be widened for."""
    patterns = ["ema", "norms.*.momentum_queue", "phases", "fp16"]
    for case in CASES:
        trainer = Trainer(case, form, average_buffers=patterns)
        module, size = trainer.model.module, dist.get_world_size()
        trainer.step()
        fill(module, trainer.rank)
        ranks = [content(rank) for rank in range(size)]
        with trainer.state.averaged():
            for name in ("ema", "norms.own.momentum_queue", "phases", "fp16"):
                mean = torch.stack([each[name] for each in ranks]).mean(0)
                mine = module.get_buffer(name)
                assert mine.dtype == mean.dtype
                off = (mine - mean).abs().max().item()
                assert off < (1e-3 if name == "fp16" else 1e-6), (name, off)
            assert torch.equal(module.get_buffer("mask"), ranks[0]["mask"])
        assert torch.equal(module.get_buffer("ema"), ranks[trainer.rank]["ema"])


@pytest.mark.parametrize("form", ["register", "hook"])
def test_buffers_that_the_user_names_are_averaged(form: Form) -> None:
    run_ranks(user_named, 2, form)


def names_by_rank(names: Sequence[Sequence[str]], form: Form) -> None:
    case = Case("LocalSGD", {"tau": 2}, model=holder)
    Trainer(case, form, average_buffers=names[dist.get_rank()]).step()


@pytest.mark.parametrize("form", ["register", "hook"])
@pytest.mark.parametrize(
    ("names", "word"),
    [
        ((["ema", "norm.*"], ["ema", "norm.*"]), r"norm\.\*"),
        ((["ema"], []), "average_buffers"),
    ],
    ids=["nothing-of-that-name", "only-one-rank-names-it"],
)
def test_names_are_checked_at_registration(
    names: Sequence[Sequence[str]], word: str, form: Form
) -> None:
    for outcome in rank_outcomes(names_by_rank, 2, names, form, group_timeout=600.0):
        with pytest.raises(commhooks.RegistrationError, match=word):
            raise outcome.error or AssertionError("nothing was raised")
