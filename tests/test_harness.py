"""Pins the harness: results by rank, errors with tracebacks, deadlocks with stacks, no orphans."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.harness import (
    RankDied,
    RanksFailed,
    RankStuck,
    ResourcesLeaked,
    rank_outcomes,
    run_ranks,
    scaled,
)


def summed_ranks(offset: int) -> tuple[int, float]:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_each_rank_returns_its_result(world_size: int) -> None:
    total = float(sum(rank + 10 for rank in range(world_size)))
    assert run_ranks(summed_ranks, world_size, 10) == [(r, total) for r in range(world_size)]


def one_thread_each() -> int:
    return torch.get_num_threads()


def test_workers_use_one_thread() -> None:
    assert run_ranks(one_thread_each, 2) == [1, 1]


def fail_on_rank_one() -> None:
    print("said before failing")
    if dist.get_rank() == 1:
        raise KeyError("only rank one")


def test_errors_carry_traceback_and_output() -> None:
    with pytest.raises(RanksFailed, match="fail_on_rank_one") as caught:
        run_ranks(fail_on_rank_one, 2)
    assert "rank 1: KeyError" in str(caught.value)
    assert "said before failing" in str(caught.value)


def test_expected_errors_are_told_by_rank() -> None:
    returned, raised = rank_outcomes(fail_on_rank_one, 2)
    assert returned.error is None
    assert isinstance(raised.error, KeyError)


class NeedsTwoArguments(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


def raise_unpicklable() -> None:
    raise NeedsTwoArguments("one", "two")


def test_an_error_that_does_not_pickle_arrives_as_text() -> None:
    (outcome,) = rank_outcomes(raise_unpicklable, 1)
    assert "NeedsTwoArguments" in str(outcome.error)
    assert "raise_unpicklable" in outcome.details


def wait_for_a_peer_that_never_comes() -> None:
    if dist.get_rank() == 0:
        dist.all_reduce(torch.zeros(1))
    else:
        threading.Event().wait()


def test_a_deadlock_shows_every_stack() -> None:
    outcomes = rank_outcomes(wait_for_a_peer_that_never_comes, 2, timeout=2.0, group_timeout=600)
    assert all(isinstance(outcome.error, RankStuck) for outcome in outcomes)
    assert "all_reduce" in outcomes[0].details
    assert "wait_for_a_peer_that_never_comes" in outcomes[1].details


def fail_while_the_peer_waits() -> None:
    if dist.get_rank() == 0:
        threading.Event().wait()
    raise ValueError("the cause")


def test_after_a_failure_the_others_are_not_waited_for() -> None:
    with pytest.raises(RanksFailed, match="the cause") as caught:
        run_ranks(fail_while_the_peer_waits, 2, timeout=600.0)
    assert "RankStuck" in str(caught.value)


def kill_rank_one() -> float:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1))
    return 0.0


def test_a_killed_rank_is_told_from_a_failed_one() -> None:
    survivor, killed = rank_outcomes(kill_rank_one, 2)
    assert isinstance(killed.error, RankDied)
    assert "-9" in killed.details
    assert isinstance(survivor.error, RuntimeError)  # gloo noticed the closed connection


def leave_a_thread() -> None:
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def test_a_leaked_thread_is_an_error() -> None:
    (outcome,) = rank_outcomes(leave_a_thread, 1)
    assert isinstance(outcome.error, ResourcesLeaked)


def is_initialised() -> bool:
    return dist.is_initialized()


def test_a_task_may_go_without_a_group() -> None:
    assert run_ranks(is_initialised, 1, initialise=False) == [False]


def test_no_child_is_left() -> None:
    rank_outcomes(wait_for_a_peer_that_never_comes, 2, timeout=0.5)
    assert multiprocessing.active_children() == []


def write_pid_and_wait(folder: Path) -> None:
    (folder / f"pid{dist.get_rank()}").write_text(str(os.getpid()))
    threading.Event().wait()


PARENT = """
import signal
import sys
from pathlib import Path
from tests.harness import run_ranks
from tests.test_harness import write_pid_and_wait
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
run_ranks(write_pid_and_wait, 2, Path(sys.argv[1]), timeout=600.0)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_with_a_killed_parent(how: signal.Signals, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        cwd=root,
        stderr=subprocess.DEVNULL,
    ) as parent:
        try:
            pids = [_eventually_read(tmp_path / f"pid{rank}") for rank in range(2)]
            parent.send_signal(how)
            parent.wait(timeout=scaled(30))
        finally:
            parent.kill()
    deadline = time.monotonic() + scaled(30)
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived the process that started it"
        time.sleep(0.05)


def _eventually_read(path: Path) -> int:
    deadline = time.monotonic() + scaled(60)
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path.name} never appeared"
        time.sleep(0.05)
    return int(path.read_text())


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
