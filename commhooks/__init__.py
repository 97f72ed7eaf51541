"""Communication-efficient data-parallel training as DDP communication hooks.

Every algorithm is the state of one hook, :func:`comm_hook`::

    state = commhooks.OverlapLocalSGD(tau=8, alpha=0.6, beta=0.7)
    state.register(ddp_model, optimizer)  # the training loop does not change
"""

from commhooks import periods
from commhooks.algorithms.all_reduce import AllReduce
from commhooks.algorithms.bmuf import BMUF
from commhooks.algorithms.cocod_sgd import CoCoDSGD
from commhooks.algorithms.diloco import DiLoCo
from commhooks.algorithms.easgd import EASGD
from commhooks.algorithms.local_sgd import LocalSGD
from commhooks.algorithms.overlap_local_sgd import OverlapLocalSGD
from commhooks.algorithms.slowmo import SlowMo
from commhooks.engine.state import CommHookState
from commhooks.errors import (
    CheckpointError,
    CommHooksError,
    HyperParameterError,
    RegistrationError,
    RoundError,
)
from commhooks.hook import comm_hook
from commhooks.stats import Stats

__version__ = "0.1.0"

__all__ = [
    "BMUF",
    "EASGD",
    "AllReduce",
    "CheckpointError",
    "CoCoDSGD",
    "CommHookState",
    "CommHooksError",
    "DiLoCo",
    "HyperParameterError",
    "LocalSGD",
    "OverlapLocalSGD",
    "RegistrationError",
    "RoundError",
    "SlowMo",
    "Stats",
    "comm_hook",
    "periods",
]
