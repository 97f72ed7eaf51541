"""How much time a test may take on this machine, as busy as it is now.

The limits in the tests are written for an idle machine with two cores of 2024. `scaled` makes
them longer by the factor by which this machine is slower. So a limit ends a deadlock, and a busy
machine fails no test.
"""

import subprocess
import sys
import time

# A fixed piece of work, and the seconds that two processes take for it side by side when idle.
_WORK = "n = 0\nfor i in range(2_000_000): n += i"
_PROCESSES = 2
_REFERENCE = 0.16
# Never more than this, so that a deadlock ends in bounded time.
MOST = 6.0
# Load comes and goes while the tests run.
_OLD = 60.0

_factor = 1.0
_measured_at: float | None = None


def scaled(seconds: float) -> float:
    """``seconds`` on an idle machine, in seconds of this one."""
    return seconds * slowness()


def slowness() -> float:
    """The largest factor, from 1 to `MOST`, that was measured so far; once a minute anew."""
    global _factor, _measured_at
    if _measured_at is None or time.monotonic() - _measured_at > _OLD:
        _factor = min(MOST, max(_factor, _measure()))
        _measured_at = time.monotonic()
    return _factor


def _measure() -> float:
    start = time.monotonic()
    command = [sys.executable, "-I", "-S", "-c", _WORK]
    for process in [subprocess.Popen(command) for _ in range(_PROCESSES)]:
        process.wait()
    return (time.monotonic() - start) / _REFERENCE
