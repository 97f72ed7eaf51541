"""Pins that a process may end with a round in flight, and is not aborted by what it leaves."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.harness import scaled

SCENARIOS = ("round", "gradients", "deadlock")
ENDS = ("destroy", "leave")

# Forks two ranks for every scenario and end. Each falls off the end of the program, and so ends
# as an interpreter does: with exit functions and static destructors.
PROGRAM = """
import ctypes
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from commhooks.engine.network import waiting
from tests.cases import one_case
from tests.late_release import release_callbacks_late
from tests.training import Trainer


def with_a_round_in_flight(rank):
    trainer = Trainer(one_case("OverlapLocalSGD", 3))
    for step in range(1, 7):
        if step == 6 and rank == 1:
            time.sleep(1)  # rank 0 is on its way out, if nothing keeps it
        trainer.step()  # the last one launches a round, and nobody waits for it


def with_gradients_just_averaged(rank):
    release_callbacks_late()
    Trainer(one_case("AllReduce", 1)).step()


def with_collectives_that_wait_for_ever(rank):
    waiting._PATIENCE_S, waiting._POLL_S = 2.0, 0.5
    trainer = Trainer(one_case("LocalSGD", 3))
    trainer.step()
    try:
        if rank == 1:
            dist.barrier()  # ends when the other process has
        trainer.state.finish()
    except RuntimeError:
        pass


SCENARIOS = {
    "round": with_a_round_in_flight,
    "gradients": with_gradients_just_averaged,
    "deadlock": with_collectives_that_wait_for_ever,
}


def main(folder, scenario, end, rank):
    torch.set_num_threads(1)
    store = f"file://{folder / scenario}-{end}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=TIMEOUT)
    SCENARIOS[scenario](rank)
    if end == "destroy":
        dist.destroy_process_group()


folder, scenarios, ends = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(",")
TIMEOUT = timedelta(seconds=float(sys.argv[4]))
children = {}
for name in [(s, e, r) for s in scenarios for e in ends for r in range(2)]:
    if (pid := os.fork()) == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end with the parent, however it ends
        main(folder, *name)
        break
    children[pid] = name
else:
    statuses = {}
    for _ in range(len(children)):
        pid, status = os.wait()
        scenario, end, _ = children[pid]
        statuses.setdefault(f"{scenario}-{end}", []).append(os.waitstatus_to_exitcode(status))
    (folder / "statuses.json").write_text(json.dumps(statuses))
"""


@pytest.fixture(scope="module")
def statuses(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[int]]:
    """The exit codes of both ranks, by scenario and end."""
    folder = tmp_path_factory.mktemp("ends")
    names, limit = [",".join(SCENARIOS), ",".join(ENDS)], scaled(60)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), *names, str(limit)],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    read: dict[str, list[int]] = json.loads((folder / "statuses.json").read_text())
    return read


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_process_may_end_at_any_time(
    scenario: str, end: str, statuses: Mapping[str, list[int]]
) -> None:
    assert statuses[f"{scenario}-{end}"] == [0, 0]
