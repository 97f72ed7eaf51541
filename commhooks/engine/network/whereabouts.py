"""Where this process is: its line of code, and the collective that it waits for."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.distributed import distributed_c10d

from commhooks.engine.network.deadlock import Awaited, Standing

__all__ = ["Rest", "look", "operations"]

# Of these every rank waits for all others, so that nobody has left one that somebody is still in.
_OF_ALL = frozenset(("all_gather", "all_reduce", "all_to_all", "barrier"))
# Of these the root waits for the others.
_TO_ROOT = frozenset(("gather", "reduce"))
# Of these the others wait for the root.
_FROM_ROOT = frozenset(("broadcast", "scatter"))

# What users call.
_PUBLIC = frozenset(distributed_c10d.__all__)

_NEWEST = 200

# What a thread that waits uses of a processor.
_NOTHING_S = 0.02

_LIBRARY = str(Path(__file__).parents[2]) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_PYTHON = str(Path(os.__file__).parent) + os.sep


class Rest:
    """For how long a thread has used no processor.

    Attributes:
        seconds: as of the last look.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._busy_at = 0.0
        self._used = -1.0

    def look(self, thread: int) -> None:
        """Look at the thread, from another one."""
        # Some systems cannot tell, and none may be asked of a thread that has ended.
        if not hasattr(time, "pthread_getcpuclockid") or thread not in sys._current_frames():
            return
        now, used = time.monotonic(), time.clock_gettime(time.pthread_getcpuclockid(thread))
        if used - self._used > _NOTHING_S:
            self._busy_at, self._used = now, used
        self.seconds = now - self._busy_at


def look(
    thread: int,
    words: str | None,
    group: str | None,
    number: int | None,
    ranks: tuple[int, ...],
    *,
    idle: bool = False,
) -> Standing:
    """What this process says of itself.

    Args:
        thread: the one that trains.
        words: what it waits in, if it is a wait of this package; None for the name of the call.
        group: the name of the group that it then waits for; None if it is no wait of this package.
        number: of the collective; None for the last one of the group.
        ranks: those that have to come.
        idle: whether the thread has used no processor for long.
    """
    entries = _entries()
    begun = {
        str(name): operations(own)
        for own, name in list(distributed_c10d._world.pg_names.items())
        if _is_gloo(own)
    }
    frames = _frames(thread)
    awaited = None
    if not _another_communicates(entries, thread):
        if group is None:
            awaited = _torchs_wait(frames, entries, thread)
            if awaited is None and idle:
                awaited = _backwards_wait(frames, entries, thread)
        else:
            last = _last(entries, group)
            if number is not None:
                awaited = Awaited(group, number, "all_reduce", ranks)
            elif last is not None:
                awaited = Awaited(group, last["collective_seq_id"], _kind(last), ranks)
    kinds: dict[str, dict[int, str]] = {}
    for entry in entries[-_NEWEST:]:
        if not entry["is_p2p"]:
            kinds.setdefault(_group(entry), {})[entry["collective_seq_id"]] = _kind(entry)
    return Standing(_place(frames, words), awaited, begun, kinds)


def _frames(thread: int) -> list[FrameType]:
    """What the thread is in, the innermost first."""
    frames = []
    frame = sys._current_frames().get(thread)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _place(frames: list[FrameType], words: str | None) -> str:
    """The user's line, and the call in it."""
    call = None
    for frame in frames:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(_LIBRARY):
            call = "registration" if name.startswith("_") else f"{name}()"
        elif file.startswith(_TORCH):
            if name == "backward" or (file == distributed_c10d.__file__ and name in _PUBLIC):
                call = f"torch's {name}()"
        elif "site-packages" in file or not file.startswith((_PYTHON, "<frozen")):
            line = f"{Path(file).name}:{frame.f_lineno}"
            call = words or call
            return f"in {call}, called at {line}" if call else f"at {line}"
    return f"in {words or call}" if words or call else "at its end"


def _torchs_wait(
    frames: list[FrameType], entries: list[dict[str, Any]], thread: int
) -> Awaited | None:
    """The collective of the user's own that the thread waits for in torch."""
    frame = next((f for f in frames if f.f_code.co_filename == distributed_c10d.__file__), None)
    if frame is None:
        return None
    here = frame.f_locals
    work, group, opts = here.get("work"), here.get("group"), here.get("opts")
    if not isinstance(work, dist.Work) or here.get("async_op") or work.is_completed():
        return None
    own = group or dist.group.WORLD
    if not isinstance(own, dist.ProcessGroup) or not _is_gloo(own):
        return None
    name = distributed_c10d._world.pg_names.get(own)
    last = _last(entries, name) if name is not None else None
    if name is None or last is None or last["thread_id"] != str(thread):
        return None
    kind = _kind(last)
    ranks: tuple[int, ...] = tuple(dist.get_process_group_ranks(own))
    if kind in _TO_ROOT | _FROM_ROOT:
        root = getattr(opts, "rootRank", None)
        if root is None or (own.rank() == root) == (kind in _FROM_ROOT):
            return None
        ranks = ranks if kind in _TO_ROOT else (ranks[root],)
    elif kind not in _OF_ALL:
        return None
    return Awaited(name, last["collective_seq_id"], kind, ranks)


def _backwards_wait(
    frames: list[FrameType], entries: list[dict[str, Any]], thread: int
) -> Awaited | None:
    """The all-reduce of a plain DDP model that an idle backward waits for, in C++."""
    code = frames[0].f_code if frames else None
    if code is None or code.co_name != "_engine_run_backward" or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    mine = [each for each in entries if each["thread_id"] == str(thread) and not each["is_p2p"]]
    if not mine or mine[-1]["retired"] or _kind(mine[-1]) != "all_reduce":
        return None
    name = _group(mine[-1])
    own = next((g for g, n in distributed_c10d._world.pg_names.items() if n == name), None)
    if own is None or not _is_gloo(own):
        return None
    ranks = tuple(dist.get_process_group_ranks(own))
    return Awaited(name, mine[-1]["collective_seq_id"], "all_reduce", ranks)


# torch's flight recorder, which has the newest 2,000 operations of all groups.


def _entries() -> list[dict[str, Any]]:
    dump = _distributed_c10d._dump_fr_trace_json  # type: ignore[attr-defined]
    dumped = dump(includeCollectives=True, onlyActive=False)
    entries: list[dict[str, Any]] = json.loads(dumped).get("entries", [])
    return entries


def _group(entry: dict[str, Any]) -> str:
    return str(entry["process_group"][0])


def _kind(entry: dict[str, Any]) -> str:
    return str(entry["profiling_name"]).removeprefix("gloo:")


def _last(entries: list[dict[str, Any]], group: str) -> dict[str, Any] | None:
    """The newest operation on the group, if it is a collective that has not ended."""
    newest = next((each for each in reversed(entries) if _group(each) == group), None)
    return None if newest is None or newest["is_p2p"] or newest["retired"] else newest


def _another_communicates(entries: list[dict[str, Any]], thread: int) -> bool:
    """Whether another thread of this process begins collectives, and so may free those that wait.

    The threads in which autograd runs hooks are none of Python's.
    """
    others = {
        str(each.ident)
        for each in threading.enumerate()
        if each.ident != thread and not isinstance(each, threading._DummyThread)
    }
    return any(entry["thread_id"] in others for entry in entries)


def operations(group: dist.ProcessGroup) -> int:
    """How many operations this rank has begun on a group of gloo."""
    number: int = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return number


def _is_gloo(group: dist.ProcessGroup) -> bool:
    """Whether all that is sent goes through gloo, which is what the rest knows about."""
    parts = dist.get_backend_config(group).split(",")
    return {part.rpartition(":")[2] for part in parts} == {"gloo"}
