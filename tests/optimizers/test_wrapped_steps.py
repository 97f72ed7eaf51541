"""Pins what wraps an optimizer's step: a GradScaler that is copied, torch.compile."""

import copy
import pickle
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.cases import Case, two_cases
from tests.expected import assert_follows, assert_ranks_follow, reference_workers
from tests.harness import run_ranks
from tests.training import Trainer
from tests.works_with.test_amp import ScaledTrainer

CopyScaler = Callable[[torch.amp.GradScaler], torch.amp.GradScaler]


def deep(scaler: torch.amp.GradScaler) -> torch.amp.GradScaler:
    return copy.deepcopy(scaler)


def pickled(scaler: torch.amp.GradScaler) -> torch.amp.GradScaler:
    return pickle.loads(pickle.dumps(scaler))  # type: ignore[no-any-return]


class CopiesItsScaler(ScaledTrainer):
    """After three steps the loop goes on with a copy, whose scale has been halved by then."""

    growth_interval = 100

    def __init__(self, case: Case, copied: CopyScaler) -> None:
        self.copied = copied
        super().__init__(case, give_scaler=True, overflows=[5] if dist.get_rank() == 1 else [])

    def backward(self) -> None:
        if self.steps == 4:
            self.scaler = self.copied(self.scaler)
        super().backward()


def scaled(cases: Sequence[Case], copied: CopyScaler) -> list[tuple[list[Tensor], list[float]]]:
    runs = []
    for case in cases:
        trainer = CopiesItsScaler(case, copied)
        original, steps = trainer.scaler, []
        for _ in range(case.steps):
            trainer.step()
            trainer.model(torch.zeros(1, 5))  # a skipped step of the copy may end with it only
            steps.append(trainer.x)
        runs.append((steps, [original.get_scale(), trainer.scaler.get_scale()]))
    return runs


@pytest.mark.parametrize("copied", [deep, pickled])
def test_a_copy_of_the_scaler_steps_for_itself(copied: CopyScaler) -> None:
    """Its ``step`` was the original's, bound to the original's scale and overflows."""
    cases = two_cases(steps=8)
    for case, *runs in zip(cases, *run_ranks(scaled, 2, cases, copied), strict=True):
        workers = reference_workers(case, 2)
        expected = [workers.step(case.backward, {(1, 5)}) for _ in range(case.steps)]
        assert_follows(case, [steps for steps, _ in runs], expected)
        assert [scales for _, scales in runs] == [[1024.0, 1024.0], [1024.0, 512.0]]


# torch.compile.


class CompiledStep(Trainer):
    """Compiles a function of the loop's that steps, with a backend that only traces."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.compiled = torch.compile(self.step_all, backend="eager")

    def step_all(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def optimize(self) -> None:
        self.compiled()
        self.model.zero_grad()


def compiled_steps(cases: Sequence[Case]) -> tuple[list[list[Tensor]], list[str]]:
    """The trajectories, and which of the package's files Dynamo has looked into."""
    from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

    torch._dynamo.reset()
    clear_compilation_metrics()
    runs = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for case in cases:
            trainer = CompiledStep(case)
            runs.append([trainer.step() for _ in range(case.steps)])
    texts = [str(each.message) for each in caught]
    texts += [str(reason) for reason in counters["graph_break"]]
    texts += [str(each.co_filename) for each in get_compilation_metrics()]
    return runs, [text for text in texts if "commhooks" in text]


def test_a_compiled_step_does_not_trace_the_engine() -> None:
    cases = two_cases(steps=6)
    ranks = run_ranks(compiled_steps, 2, cases, timeout=100.0)
    assert_ranks_follow(cases, [runs for runs, _ in ranks])
    assert [texts for _, texts in ranks] == [[], []]
