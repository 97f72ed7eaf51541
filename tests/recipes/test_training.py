"""The pieces of a training loop, by themselves."""

import math
import time
from unittest.mock import Mock

import pytest
import torch

from commhooks import CommHookState, Stats
from common.traffic import Traffic
from common.training import Mean, Stopwatch


def test_a_stopwatch_counts_while_it_runs() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.running():
            time.sleep(0.02)
            assert watch.seconds > 0
        time.sleep(0.2)
    assert 0.04 <= watch.seconds < 0.2


def test_a_stopwatch_stops_when_its_block_fails() -> None:
    watch = Stopwatch(torch.device("cpu"))
    with pytest.raises(KeyError), watch.running():
        raise KeyError
    stopped = watch.seconds
    time.sleep(0.01)
    assert watch.seconds == stopped


def test_a_mean_begins_anew_once_taken() -> None:
    mean = Mean()
    for value in (1.0, 2.0, 6.0):
        mean.add(torch.tensor(value, requires_grad=True))
    assert mean.take() == 3.0
    mean.add(torch.tensor(5.0))
    assert mean.take() == 5.0
    # The run ended where it had just been tested.
    assert mean.take() == 5.0
    assert math.isnan(Mean().take())


def test_what_evaluation_sends_is_not_counted() -> None:
    state = Mock(spec=CommHookState, stats=Stats(step=3, bytes_reduced=100, seconds_hidden=1.0))
    traffic = Traffic(state)
    with traffic.not_counted():
        state.stats = Stats(step=3, bytes_reduced=150, seconds_exposed=0.5, seconds_hidden=1.25)
    assert traffic.stats == Stats(step=3, bytes_reduced=100, seconds_hidden=1.0)
    state.stats = Stats(step=9, bytes_reduced=170, seconds_exposed=0.75, seconds_hidden=2.25)
    expected = Stats(step=9, bytes_reduced=120, seconds_exposed=0.25, seconds_hidden=2.0)
    assert traffic.stats == expected


def test_plain_ddp_counts_nothing() -> None:
    traffic = Traffic(None)
    with traffic.not_counted():
        pass
    assert traffic.stats is None
