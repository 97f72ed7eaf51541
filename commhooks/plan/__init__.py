"""What a network will cost: step time, traffic and memory of every algorithm, predicted.

``python -m commhooks.plan`` ranks what could be done, or measures the machines that it runs on. See
:mod:`commhooks.plan.command_line`.
"""

from commhooks.plan.command_line import main
from commhooks.plan.model import (
    ALGORITHMS,
    COMPRESSIONS,
    Algorithm,
    Network,
    Prediction,
    Work,
    algorithms,
    hiding_delay,
    hiding_tau,
    parse_count,
    parse_rate,
    predict,
)
from commhooks.plan.ranking import Choice, choices, constructor, learning_rate

__all__ = [
    "ALGORITHMS",
    "COMPRESSIONS",
    "Algorithm",
    "Choice",
    "Network",
    "Prediction",
    "Work",
    "algorithms",
    "choices",
    "constructor",
    "hiding_delay",
    "hiding_tau",
    "learning_rate",
    "main",
    "parse_count",
    "parse_rate",
    "predict",
]
