"""Within a sandbox: ranks on a switch, and the link of rank 1 cut for a while.

``cut_link.py FOLDER SECONDS TIMEOUT STEPS``; the sandbox ends every process with this one.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from network.namespace import run
from network.switch import INTERFACE, build_switch
from tests.signals import Signals

RANKS = 2


def main(folder: Path, seconds: float, timeout: float, steps: int) -> None:
    ports = build_switch(RANKS, None)
    signals = Signals(folder)
    script = Path(__file__).with_name("ranks_on_a_link.py")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
    processes = []
    for rank, port in enumerate(ports):
        command = [sys.executable, str(script), str(rank), str(RANKS), ports[0].address]
        with (folder / f"output-{rank}").open("w") as output, port.namespace.entered():
            processes.append(
                subprocess.Popen(
                    [*command, str(folder), str(timeout), str(steps)],
                    env=environment,
                    stdout=output,
                    stderr=output,
                )
            )
    for rank in range(RANKS):
        signals.await_(f"rank {rank} is near")
    run("ip", "link", "set", "port1", "down")
    signals.give("cut")
    time.sleep(seconds)
    run("ip", "link", "set", "port1", "up")
    for process in processes:
        process.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
