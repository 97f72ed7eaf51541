"""Pins that a process may end with a round in flight, and is not aborted by what it leaves."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.harness import scaled

SCENARIOS = ("round", "gradients", "compressed", "islands", "collective", "deadlock")
ENDS = ("destroy", "leave", "error")

# Forks the ranks of every scenario and end, again and again. Each falls off the end of the program,
# and so ends as an interpreter does: with exit functions and static destructors.
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
import tests.harness.preloaded  # or every child would import some of it by itself
from commhooks.engine.network import waiting
from tests.cases import Case, one_case
from tests.late_release import release_callbacks_late
from tests.training import Trainer, wrapped


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


def with_compressed_rounds(rank):
    trainer = Trainer(Case("OverlapLocalSGD", {"tau": 2}, compression="int8"))
    for _ in range(4):
        trainer.step()
    trainer.state.finish()


def in_islands(rank):
    trainer = Trainer(Case("OverlapLocalSGD", {"tau": 2}, island=2))
    for _ in range(4):
        trainer.step()


def after_a_collective_of_plain_ddp(rank):
    global model
    case = one_case("AllReduce", 1)
    model = wrapped(case.model(case.dtype))  # kept, and the default group with it
    case.backward(model, rank, 1)
    # The backend's thread ends the collective, and wants the lock to let go of the tensor. From
    # here on it does not get the lock before somebody sleeps.
    sys.setswitchinterval(1000)
    dist.all_reduce(torch.ones(3), async_op=True)
    sum(range(10**7))


DO = {
    "round": with_a_round_in_flight,
    "gradients": with_gradients_just_averaged,
    "compressed": with_compressed_rounds,
    "islands": in_islands,
    "collective": after_a_collective_of_plain_ddp,
    "deadlock": with_collectives_that_wait_for_ever,
}


def main(folder, scenario, end, turn, rank):
    torch.set_num_threads(1)
    store = f"file://{folder / scenario}-{end}-{turn}"
    size = ranks_of(scenario)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=TIMEOUT)
    DO[scenario](rank)
    if end == "destroy":
        dist.destroy_process_group()
    if end == "error":
        raise RuntimeError("the script's own")


def ranks_of(scenario):
    return 4 if scenario == "islands" else 2


folder, scenarios, ends = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(",")
TIMEOUT = timedelta(seconds=float(sys.argv[4]))
names = [
    (s, e, turn, r)
    for turn in range(int(sys.argv[5]))
    for s in scenarios
    for e in ends
    for r in range(ranks_of(s))
]
children, statuses = {}, {}
while names or children:
    if names and (names[0][3] or len(children) < 8):
        name = names.pop(0)
        if (pid := os.fork()) == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end with the parent, however it ends
            main(folder, *name)
            break
        children[pid] = name
    else:
        pid, status = os.wait()
        scenario, end, *_ = children.pop(pid)
        statuses.setdefault(f"{scenario}-{end}", []).append(os.waitstatus_to_exitcode(status))
else:
    (folder / "statuses.json").write_text(json.dumps(statuses))
"""


def statuses(folder: Path, turns: int, limit: float) -> Mapping[str, Counter[int]]:
    """How often each exit code was seen, by scenario and end."""
    names = [",".join(SCENARIOS), ",".join(ENDS)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), *names, str(limit), str(turns)],
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
    return {name: Counter(codes) for name, codes in read.items()}


def expected(scenario: str, end: str, turns: int) -> dict[int, int]:
    return {1 if end == "error" else 0: turns * (4 if scenario == "islands" else 2)}


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Counter[int]]:
    return statuses(tmp_path_factory.mktemp("ends"), 1, scaled(240))


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_process_may_end_at_any_time(
    scenario: str, end: str, once: Mapping[str, Counter[int]]
) -> None:
    assert once[f"{scenario}-{end}"] == expected(scenario, end, 1)


@pytest.mark.soak
def test_no_process_of_thousands_aborts_at_its_end(tmp_path: Path) -> None:
    """500 of each scenario, and more."""
    turns = 84
    found = statuses(tmp_path, turns, scaled(3600))
    assert found == {f"{s}-{e}": expected(s, e, turns) for s in SCENARIOS for e in ENDS}
