"""Counts what a task may leave behind in its process: threads and sockets."""

import gc
import os
import time
from collections import Counter
from pathlib import Path

_TASKS = Path("/proc/self/task")
_FDS = Path("/proc/self/fd")


def held() -> Counter[str]:
    """The names of this process's threads, and how many sockets it has open."""
    names: Counter[str] = Counter()
    for task in os.listdir(_TASKS):
        try:
            names["thread " + (_TASKS / task / "comm").read_text().strip()] += 1
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
    names["socket"] = sum(_is_socket(_FDS / fd) for fd in os.listdir(_FDS))
    return names


def held_beyond(before: Counter[str], patience: float) -> Counter[str]:
    """What is held now and was not ``before``, once ``patience`` let it go."""
    deadline = time.monotonic() + patience
    while True:
        gc.collect()
        extra = held() - before
        if not extra or time.monotonic() > deadline:
            return extra
        time.sleep(0.02)


def _is_socket(fd: Path) -> bool:
    try:
        return os.readlink(fd).startswith("socket:")
    except FileNotFoundError:
        return False
