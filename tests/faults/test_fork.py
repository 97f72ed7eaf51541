"""Pins that a child that a rank has forked gets through the library's callbacks at exit.

It has a copy of them and none of the backend's threads. What torch itself does after them is left
out: its destructors of a gloo group wait for those threads for ever, without this library too.
"""

import atexit
import os
import signal
from collections.abc import Sequence

from torch import Tensor

from tests.cases import Case
from tests.expected import assert_follows, reference_trajectory
from tests.harness import run_ranks
from tests.training import Trainer


def forked(cases: Sequence[Case]) -> list[tuple[list[Tensor], list[int]]]:
    """The trajectory, and the exit codes of children forked with and without a round in flight."""
    runs = []
    for case in cases:
        trainer = Trainer(case)
        steps, codes = [], []
        for step in range(1, case.steps + 1):
            steps.append(trainer.step())
            if step in (1, 4):
                codes.append(exit_code_of_a_child())
        runs.append((steps, codes))
    return runs


def exit_code_of_a_child() -> int:
    if not os.fork():
        signal.alarm(10)  # for a child that waits for threads that it does not have
        atexit._run_exitfuncs()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.wait()[1])


def test_a_forked_child_leaves_cleanly() -> None:
    """Its exit joined threads of the parent's groups: an abort, or a wait without end."""
    cases = [
        Case("LocalSGD", {"tau": 3}, steps=5),
        Case("OverlapLocalSGD", {"tau": 3}, steps=5),
        Case("AllReduce", steps=5),
    ]
    for case, *runs in zip(cases, *run_ranks(forked, 2, cases, timeout=100.0), strict=True):
        assert_follows(case, [steps for steps, _ in runs], reference_trajectory(case, 2))
        assert [codes for _, codes in runs] == [[0, 0], [0, 0]]
