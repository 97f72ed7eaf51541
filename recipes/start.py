"""Start a recipe on several processes: accelerate launch, but quiet where a run is stopped.

    python recipes/start.py recipes/vision.py --algorithm overlap-local-sgd --scale-lr

Starts two processes on this machine, on GPUs or without. In front of the recipe it takes all
options of `accelerate launch`, such as --num_processes 4. At Ctrl-C and SIGTERM it lets the
workers end and ends with the status of a shell, 130 or 143, where `accelerate launch` itself ends
with a traceback and status 1.
"""

import signal
import sys

from common.ctrl_c import leave

_DEFAULTS = {
    # The name says GPU; on a machine without, this is how Accelerate starts several processes too.
    "--multi_gpu": (),
    "--num_processes": ("2",),
    "--num_machines": ("1",),
    "--mixed_precision": ("no",),
    "--dynamo_backend": ("no",),
}


def main() -> None:
    """Do as the command line says; of an option that stands twice, the last one counts."""
    if sys.argv[1:] in ([], ["--help"], ["-h"]):
        sys.exit(__doc__)
    sys.argv[1:1] = [word for name, values in _DEFAULTS.items() for word in (name, *values)]
    # Imports take seconds, in which Ctrl-C may come; torch handles it once the workers run.
    signal.signal(signal.SIGINT, leave)
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.api import SignalException

    try:
        launch.main()
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)


if __name__ == "__main__":
    main()
