"""Pins what a rank of an island sends to the others and keeps: its share, 1/L of the model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from commhooks.engine.network.communicator import Communicator
from tests.cases import Case, one_case
from tests.diloco.family import ADAFACTOR, ADAMW
from tests.diloco.test_traffic import NUMBERS, equal_layers
from tests.harness import run_ranks
from tests.training import Trainer
from tests.workload import plain_sgd

BYTES = 4 * NUMBERS


class Kept(NamedTuple):
    """Numbers that a rank keeps, in units of the model."""

    vectors: float
    common: float
    outer: float


class Use(NamedTuple):
    """Of one rank: bytes of every step by its own count, those that left by group, its memory."""

    counted: list[int]
    sent: list[dict[int, int]]
    kept: Kept


@contextmanager
def sent_bytes() -> Iterator[dict[int, int]]:
    """Bytes of payload by the number of ranks in the group that they go over."""
    sent: dict[int, int] = {}

    def counting(start: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: Communicator, tensor: Tensor, *args: Any) -> Any:
            if tensor.dtype is torch.float32:  # tickets are of fp64
                sent[group.size] = sent.get(group.size, 0) + tensor.nbytes
            return start(group, tensor, *args)

        return call

    originals = Communicator.all_reduce, Communicator.broadcast
    Communicator.all_reduce = counting(Communicator.all_reduce)  # type: ignore[method-assign]
    Communicator.broadcast = counting(Communicator.broadcast)  # type: ignore[method-assign]
    try:
        yield sent
    finally:
        Communicator.all_reduce, Communicator.broadcast = originals  # type: ignore[method-assign]


def used(cases: Sequence[Case]) -> list[Use]:
    uses = []
    for case in cases:
        trainer = Trainer(case)
        counted, sent, before = [], [], 0
        for _ in range(case.steps):
            with sent_bytes() as by_group:
                trainer.step()
            sent.append(dict(by_group))
            now = trainer.state.stats.bytes_reduced
            counted.append(now - before)
            before = now
        uses.append(Use(counted, sent, kept(trainer)))
        trainer.state.finish()
    return uses


def kept(trainer: Trainer) -> Kept:
    engine = trainer.state._engine
    assert engine is not None
    buckets = [bucket for fragment in engine._fragments for bucket in fragment.buckets]
    vectors = sum(flat.numel() for bucket in buckets for flat in bucket.vectors.values())
    common = sum(bucket.common.numel() for bucket in buckets if bucket.common is not None)
    fragments = trainer.state.state_dict()["fragments"]
    outer = sum(numbers(part["kept"]) for part in fragments)
    return Kept(vectors / NUMBERS, common / NUMBERS, outer / NUMBERS)


def numbers(value: object) -> int:
    """How many are in the tensors of a state dictionary, counters not among them."""
    if isinstance(value, Tensor):
        return value.numel() if value.ndim else 0
    values: Sequence[object] = ()
    if isinstance(value, Mapping):
        values = list(value.values())
    elif isinstance(value, list | tuple):
        values = value
    return sum(map(numbers, values))


def cases(island: int) -> list[Case]:
    settings: dict[str, Any] = {
        "optimizers": plain_sgd,
        "model": equal_layers,
        "island": island,
        "steps": 12,
    }
    return [
        one_case("LocalSGD", 4, **settings),
        Case("OverlapLocalSGD", {"tau": 4, "beta": 0.7}, **settings),
        one_case("CoCoDSGD", 4, **settings),
        one_case("DiLoCo", 4, **settings),
        Case("DiLoCo", {"tau": 4, "fragments": 4, "delay": 2, "outer": ADAMW}, **settings),
        Case("DiLoCo", {"tau": 4, "outer": ADAFACTOR}, **settings),
    ]


VECTORS = (1, 3, 2, 2, 2, 2)
"""wire and, by algorithm, z, v and s."""

OUTER = (0, 0, 0, 1, 2, None)
"""The outer optimizer's state in units of the model; Adafactor's is smaller."""

ROUNDING = 0.15
"""Of this small model in tiny buckets, in units of a model: a number or so a bucket and share."""


@pytest.mark.parametrize(("size", "island"), [(6, 3), (3, 3)])
def test_a_rank_sends_and_keeps_its_share(size: int, island: int) -> None:
    flat, shared = cases(1), cases(island)
    islands = run_ranks(used, size, shared)
    (whole, *_) = run_ranks(used, 2, flat)
    for number, (case, one) in enumerate(zip(shared, whole, strict=True)):
        ranks = [uses[number] for uses in islands]
        for rank, use in enumerate(ranks):
            _assert_share(f"{case}, rank {rank}", use, one, size, island, number)
        # The ranks of an island together send what a worker does, and keep what it does.
        for first in range(0, size, island):
            together = ranks[first : first + island]
            for step, alone in enumerate(one.counted):
                total = sum(use.counted[step] for use in together)
                assert total == (alone if size > island else 0), f"{case}, step {step + 1}"
            assert sum(use.kept.vectors for use in together) == pytest.approx(one.kept.vectors)


def _assert_share(where: str, use: Use, whole: Use, size: int, island: int, number: int) -> None:
    peers, padding = size // island, ROUNDING * BYTES
    for counted, alone in zip(use.counted, whole.counted, strict=True):
        if peers > 1:
            assert abs(counted - alone / island) <= padding, where
        else:
            assert counted == 0, where
    # What really left: rounds between peers, and the parts that an island puts together.
    if peers > 1:
        assert [sent.get(peers, 0) for sent in use.sent] == use.counted, where
        assert all(sent.get(size, 0) == 0 for sent in use.sent), where
    assert use.kept.vectors == pytest.approx(
        VECTORS[number] / island, abs=VECTORS[number] * ROUNDING
    )
    assert whole.kept.vectors == VECTORS[number], where
    assert (use.kept.common, whole.kept.common) == (1, 0), where
    if (outer := OUTER[number]) is not None:
        assert whole.kept.outer == outer, where
        assert use.kept.outer == pytest.approx(outer / island, abs=outer * ROUNDING + 1e-9), where
    else:
        assert 0 <= use.kept.outer < whole.kept.outer < 1, where


def in_warm_up(cases: Sequence[Case]) -> list[tuple[int, int]]:
    """Bytes of a step in warm-up, and of one between two boundaries."""
    found = []
    for case in cases:
        trainer = Trainer(case)
        sums = []
        for _ in range(case.warmup_steps + 2):
            trainer.step()
            sums.append(trainer.state.stats.bytes_reduced)
        trainer.state.finish()
        found.append((sums[1] - sums[0], sums[-1] - sums[-2]))
    return found


def test_gradients_of_an_island_are_not_counted_as_a_workers() -> None:
    """They stay on its bus; in warm-up, when all ranks are one worker, they are."""
    todo = [
        one_case("LocalSGD", 4, warmup_steps=3, island=2, model=equal_layers, optimizers=plain_sgd),
        one_case("AllReduce", 1, island=2, model=equal_layers, optimizers=plain_sgd),
    ]
    for local, control in run_ranks(in_warm_up, 4, todo):
        assert local == (BYTES, 0)
        assert control == (BYTES, BYTES)
