"""Pins that a child that a rank has forked may leave through ``sys.exit``.

Its copy of the process has the library's callbacks at exit, and none of the backend's threads.
"""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness import scaled

SCRIPT = """
import os
import sys
import torch
import torch.distributed as dist
from tests.cases import one_case
from tests.training import Trainer

folder, rank, algorithm = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
trainer = Trainer(one_case(algorithm, 3))
for step in range(1, 9):
    if step in (2, 7) and not os.fork():  # with nothing in flight, and with a round
        sys.exit(0)
    trainer.step()
    if step in (2, 7):
        _, status = os.wait()
        assert os.waitstatus_to_exitcode(status) == 0, f"the child left with {status}"
trainer.state.finish()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("algorithm", ["LocalSGD", "OverlapLocalSGD", "AllReduce"])
def test_a_forked_child_leaves_cleanly(algorithm: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", SCRIPT, str(tmp_path), str(rank), algorithm],
                    cwd=Path(__file__).parent.parent.parent,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in range(2)
        ]
        for rank in ranks:
            stack.callback(rank.kill)
        errors = [rank.communicate(timeout=scaled(90))[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
