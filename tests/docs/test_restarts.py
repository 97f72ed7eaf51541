"""Pins that what docs/reliability.md tells about a launcher's restarts brings a script up again."""

import os
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.harness import scaled

PAGE = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
(FUNCTION,) = re.findall(r"^  ```py\n(.*?)^  ```$", PAGE, re.MULTILINE | re.DOTALL)
(VARIABLE,) = re.findall(r"^  (TORCH_\w+=1) torchrun --standalone", PAGE, re.MULTILINE)
TORCHS = "import os\nimport torch.distributed as dist\nfrom torch.distributed import *\n"
SCRIPT = """
import signal
import torch

init_process_group("gloo")
rank, attempt = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"]
ones = torch.ones(1)
dist.all_reduce(ones)
open(f"{attempt}-{rank}", "w").close()
dist.barrier()
if attempt in "01" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
dist.destroy_process_group()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.slow
@pytest.mark.parametrize(
    ("meeting", "options", "variables"),
    [
        pytest.param(FUNCTION, [], {}, id="function, static"),
        pytest.param(FUNCTION, ["--standalone"], {}, id="function, standalone"),
        pytest.param(TORCHS, ["--standalone"], dict([VARIABLE.split("=")]), id="variable"),
        pytest.param(FUNCTION, ["--standalone"], dict([VARIABLE.split("=")]), id="both"),
    ],
)
def test_every_attempt_comes_up(
    meeting: str, options: Sequence[str], variables: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(textwrap.dedent(meeting) + SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    if not options:
        options = ["--master-port", str(free_port())]
    # A worker is killed in each of the first two attempts, so that the third has to come up.
    subprocess.run(
        [*launcher, *options, "--max-restarts", "2", "script.py"],
        cwd=tmp_path,
        env={**os.environ, **variables, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=scaled(120),
    )
    came_up = {path.name for path in tmp_path.glob("?-?")}
    assert came_up == {f"{attempt}-{rank}" for attempt in range(3) for rank in range(2)}
