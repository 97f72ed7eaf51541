"""The algorithms once more, slow and obvious: m workers in one process, whole-model vectors.

Written from the table of equations, not from the library, which is held to it step by step.
"""

from tests.reference.algorithms import (
    BMUF,
    EASGD,
    AllReduce,
    CoCoDSGD,
    LocalSGD,
    OverlapLocalSGD,
    Reference,
)
from tests.reference.diloco import DiLoCo
from tests.reference.slowmo import SlowMo
from tests.reference.vectors import flat, mean, write
from tests.reference.workers import Workers

__all__ = [
    "BMUF",
    "EASGD",
    "AllReduce",
    "CoCoDSGD",
    "DiLoCo",
    "LocalSGD",
    "OverlapLocalSGD",
    "Reference",
    "SlowMo",
    "Workers",
    "flat",
    "mean",
    "write",
]
