"""What a process has allocated, from the allocator and the kernel, not from what it should have."""

import ctypes
import gc
from pathlib import Path

__all__ = ["live_bytes", "peak_bytes", "release", "reset_peak"]

_libc = ctypes.CDLL(None)


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def live_bytes() -> int:
    """Bytes that are allocated now, by whoever, exact (glibc's ``mallinfo2``)."""
    _libc.mallinfo2.restype = _MallInfo
    info = _libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def release() -> None:
    """Give back what is free, down to the kernel."""
    gc.collect()
    _libc.malloc_trim(0)


def reset_peak() -> int:
    """Forget the peak so far; the resident bytes that the next starts from."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """The most that has been resident since :func:`reset_peak`, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")
