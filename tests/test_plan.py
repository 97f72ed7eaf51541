"""The cost model, against what `make bench` recorded on shaped links and against its own limits.

To measure again::

    make bench BENCHFLAGS="--no-micro --only commhooks --record tests/plan_measurements.json"
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commhooks.plan import (
    ALGORITHMS,
    Algorithm,
    Network,
    Work,
    hiding_tau,
    parse_rate,
    predict,
)

MEASURED = json.loads((Path(__file__).parent / "plan_measurements.json").read_text())
BY_NAME = {algorithm.name: algorithm for algorithm in ALGORITHMS}
# As the benchmark calls them.
CONTENDERS = {
    "commhooks AllReduce": "AllReduce",
    "commhooks LocalSGD": "LocalSGD",
    "commhooks BMUF": "BMUF",
    "commhooks OverlapLocalSGD": "OverlapLocalSGD",
    "commhooks OverlapLocalSGD, beta=0.7": "OverlapLocalSGD, beta > 0",
    "commhooks EASGD": "EASGD",
    "commhooks CoCoDSGD": "CoCoDSGD",
}
RECORDED = [m for m in MEASURED if m["contender"] in CONTENDERS]
WORK = Work(payload=44e6, step=0.3)
SLOW = Network(ranks=2, bandwidth=200e6)


@pytest.mark.parametrize(
    "measured", RECORDED, ids=lambda m: f"{m['contender']} {m['ranks']}x{m['rate']}"
)
def test_within_15_percent_of_what_was_measured(measured: dict[str, Any]) -> None:
    network = Network(measured["ranks"], parse_rate(measured["rate"]))
    work = Work(measured["parameter_bytes"], measured["compute_ms"] / 1e3)
    algorithm = BY_NAME[CONTENDERS[measured["contender"]]]
    predicted = predict(algorithm, measured["tau"], work, network).step * 1e3
    assert predicted == pytest.approx(measured["step_ms"], rel=0.15)


def test_every_algorithm_was_measured_on_every_shaped_link() -> None:
    links = {(ranks, rate) for ranks in (2, 4) for rate in ("1gbit", "200mbit", "50mbit")}
    assert {(m["ranks"], m["rate"]) for m in RECORDED} == links
    assert {m["contender"] for m in RECORDED} == set(CONTENDERS)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_an_infinite_link_costs_nothing(algorithm: Algorithm) -> None:
    found = predict(algorithm, 8, WORK, Network(ranks=4, bandwidth=float("inf")))
    assert found.exposed == pytest.approx(0.0)
    assert found.step == pytest.approx(WORK.step)


def test_the_hiding_tau_hides_and_no_smaller_one_does() -> None:
    tau = hiding_tau(WORK, SLOW)
    overlapped = BY_NAME["EASGD"]
    assert predict(overlapped, tau, WORK, SLOW).exposed == 0.0
    assert predict(overlapped, tau - 1, WORK, SLOW).exposed > 0.0


def test_a_longer_all_reduce_sets_the_pace() -> None:
    found = predict(BY_NAME["CoCoDSGD"], 2, WORK, SLOW)
    assert 2 * found.step == pytest.approx(SLOW.all_reduce_seconds(WORK.payload))


def test_latency_is_paid_once_a_message() -> None:
    slow = Network(ranks=5, bandwidth=1e9, latency=0.01)
    fast = Network(ranks=5, bandwidth=1e9)
    assert slow.all_reduce_seconds(1e6) - fast.all_reduce_seconds(1e6) == pytest.approx(0.08)


@pytest.mark.parametrize(
    ("text", "rate"), [("200mbit", 2e8), ("1gbit", 1e9), ("2.5gbit", 2.5e9), ("64kbit", 64e3)]
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["fast", "200", "mbit", "200MB"])
def test_no_rates(text: str) -> None:
    with pytest.raises(ValueError, match=r"could not convert|is no rate"):
        parse_rate(text)


def test_command_line() -> None:
    words = "--params 124e6 --step-ms 300 --bandwidth 1gbit --latency-ms 0.5 --ranks 16"
    done = subprocess.run(
        [sys.executable, "-m", "commhooks.plan", *words.split()],
        capture_output=True,
        text=True,
        check=True,
    )
    for algorithm in ALGORITHMS:
        assert algorithm.name in done.stdout
    assert "The smallest tau that hides it under the steps is 27." in done.stdout
