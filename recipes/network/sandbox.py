"""A private corner of the kernel, in which namespaces can be made without being root.

The command that runs in it is process number 1 of a process namespace: when it ends, however it
ends, the kernel kills everything that was started in it and removes every interface.
"""

import os
import shutil
import subprocess

__all__ = ["command", "refusal"]

# What the switch needs, tried out once before anything depends on it.
_TRIAL = (
    "ip link add trial0 type veth peer name trial1 && ip link add trial2 type bridge && "
    "tc qdisc add dev trial0 root tbf rate 1mbit burst 128kb latency 400ms"
)


def command(*words: str) -> list[str]:
    """``words`` as a command that runs in a sandbox and ends with its status."""
    # An ordinary user becomes root of a user namespace, and with that of all others made in it.
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    spaces = ["--net", "--pid", "--mount-proc", "--fork", "--kill-child"]
    return ["unshare", *user, *spaces, "--", *words]


def refusal() -> str | None:
    """Why there can be no sandbox on this machine, if there cannot."""
    missing = [tool for tool in ("unshare", "ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found (util-linux and iproute2 have them)"
    trial = subprocess.run(command("sh", "-c", _TRIAL), capture_output=True, text=True, check=False)
    if trial.returncode == 0:
        return None
    return trial.stderr.strip().splitlines()[-1] if trial.stderr.strip() else "unshare failed"
