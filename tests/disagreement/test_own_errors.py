"""Pins an error of one rank's own inside averaged(): told to all ranks, and over after that."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import commhooks
from tests.cases import Case
from tests.expected import assert_follows, reference_workers
from tests.harness import run_ranks
from tests.training import Trainer
from tests.workload import initialise

LARGE = 30
"""Numbers of a tensor whose memory may be refused: a weight's copy, a bucket; no counter."""


class FullMemory(TorchFunctionMode):
    """Refuses the memory of one large tensor: the ``refused``-th that is asked for."""

    def __init__(self, refused: int = 0) -> None:
        super().__init__()
        self.refused, self.asked = refused, 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, list | tuple) else [result]
        if any(isinstance(t, Tensor) and _is_large(t) for t in made):
            self.asked += 1
            if self.asked == self.refused:
                raise torch.OutOfMemoryError("out of memory")
        return result


def _is_large(made: Tensor) -> bool:
    """Tickets, which tell the others of a failure, are in fp64, and the models are not."""
    return made.numel() >= LARGE and made.dtype != torch.float64 and not made._is_view()


@contextmanager
def entering(trainer: Trainer, memory: FullMemory) -> Iterator[None]:
    """``averaged()``, of which the way in alone is short of memory."""
    block = trainer.state.averaged()
    with memory:
        block.__enter__()
    try:
        yield
    finally:
        block.__exit__(None, None, None)


def out_of_memory(cases: Sequence[Case], broken: int) -> list[list[Tensor]]:
    """At every place where averaged() asks for memory, one rank once has none; then on it goes."""
    runs = []
    for case in cases:
        trainer = Trainer(case)
        steps = [trainer.step() for _ in range(3)]
        count = FullMemory()
        with entering(trainer, count):
            pass
        places = torch.tensor(count.asked)
        dist.broadcast(places, src=broken)
        assert places > 0, "nothing was asked for, so that nothing can fail"
        for place in sorted({1, int(places) // 3 + 1, int(places)}):
            x = trainer.x
            memory = FullMemory(place if trainer.rank == broken else 0)
            with (
                pytest.raises(commhooks.RoundError, match=f"rank {broken}.*out of memory"),
                entering(trainer, memory),
            ):
                pass
            assert torch.equal(trainer.x, x)
            with trainer.state.averaged():
                pass
            steps.append(trainer.step())
        trainer.state.finish()
        steps.append(trainer.x)
        runs.append(steps)
    return runs


@pytest.mark.parametrize("broken", [0, 2])
def test_memory_that_runs_out_on_one_rank(broken: int) -> None:
    cases = [
        Case("LocalSGD", {"tau": 2}),
        Case("OverlapLocalSGD", {"tau": 2}),
        Case("CoCoDSGD", {"tau": 3}),
    ]
    for case, *real in zip(cases, *run_ranks(out_of_memory, 3, cases, broken), strict=True):
        workers = reference_workers(case, 3)
        expected = [workers.step(case.backward) for _ in range(len(real[0]) - 1)]
        expected.append([workers.finish()] * 3)
        assert_follows(case, real, expected)


def normalised(dtype: torch.dtype) -> nn.Module:
    return initialise(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)))


def statistics_made_in_inference_mode() -> Tensor:
    """On rank 1 alone, which may not write to them: refused on all ranks or none, for once."""
    trainer = Trainer(Case("LocalSGD", {"tau": 2}, model=normalised))
    trainer.step()
    norm = trainer.model.module.get_submodule("1")
    if trainer.rank == 1:
        with torch.inference_mode():
            norm.running_mean = torch.zeros(7)
    refusal = ""
    try:
        with trainer.state.averaged():
            pass
    except commhooks.RoundError as error:
        refusal = str(error)
    assert not refusal or "rank 1" in refusal
    refusals = [refusal] * 2
    dist.all_gather_object(refusals, refusal)
    assert all(refusals) or not any(refusals)
    norm.running_mean = norm.get_buffer("running_mean").clone()
    trainer.step()
    trainer.state.finish()
    return trainer.x


def test_an_inference_tensor_on_one_rank() -> None:
    first, second = run_ranks(statistics_made_in_inference_mode, 2)
    assert torch.equal(first, second)
