"""Pins that a process may end with a round in flight, and is not aborted by what it leaves."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

WITH_A_ROUND_IN_FLIGHT = """
import sys
import time
import torch.distributed as dist
from tests.cases import one_case
from tests.training import Trainer

folder, rank, destroy = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
trainer = Trainer(one_case("OverlapLocalSGD", 3))
for step in range(1, 7):
    if step == 6 and rank == 1:
        time.sleep(1)  # rank 0 is on its way out, if nothing keeps it
    trainer.step()  # the last one launches a round, and nobody waits for it
if destroy == "destroy":
    dist.destroy_process_group()
"""


WITH_GRADIENTS_JUST_AVERAGED = """
import sys
import torch.distributed as dist
from tests.cases import one_case
from tests.late_release import release_callbacks_late
from tests.training import Trainer

folder, rank, destroy = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
release_callbacks_late()
Trainer(one_case("AllReduce", 1)).step()
if destroy == "destroy":
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("destroy", ["destroy", "leave"])
@pytest.mark.parametrize(
    "script", [WITH_A_ROUND_IN_FLIGHT, WITH_GRADIENTS_JUST_AVERAGED], ids=["round", "gradients"]
)
def test_a_process_may_end_at_any_time(script: str, destroy: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", script, str(tmp_path), str(rank), destroy],
                    cwd=Path(__file__).parent.parent,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in range(2)
        ]
        for rank in ranks:
            stack.callback(rank.kill)
        errors = [rank.communicate(timeout=90)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
