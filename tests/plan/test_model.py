"""The cost model, against what `make bench` recorded on shaped links and against its own limits.

To measure again::

    make bench BENCHFLAGS="--no-micro --only commhooks --record tests/plan_measurements.json"
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import commhooks
from commhooks.plan import (
    ALGORITHMS,
    Algorithm,
    Network,
    Work,
    hiding_delay,
    hiding_tau,
    parse_count,
    parse_rate,
    predict,
)

MEASURED = json.loads((Path(__file__).parents[1] / "plan_measurements.json").read_text())
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


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("SlowMo", commhooks.SlowMo(8)),
        ("BMUF", commhooks.BMUF(8)),
        ("DiLoCo", commhooks.DiLoCo(8)),
        ("DiLoCo, delay=tau", commhooks.DiLoCo(8, delay=8)),
        ("DiLoCo, delay=tau, merge=carry", commhooks.DiLoCo(8, delay=8, merge="carry")),
        ("DiLoCo, fragments=4, delay=tau/4", commhooks.DiLoCo(8, fragments=4, delay=2)),
        ("CoCoDSGD", commhooks.CoCoDSGD(8)),
        ("EASGD", commhooks.EASGD(8)),
        ("OverlapLocalSGD", commhooks.OverlapLocalSGD(8)),
        ("OverlapLocalSGD, beta > 0", commhooks.OverlapLocalSGD(8, beta=0.7)),
        ("LocalSGD", commhooks.LocalSGD(8)),
    ],
)
def test_delays_fragments_and_memory_are_the_states(
    name: str, state: commhooks.CommHookState
) -> None:
    found = BY_NAME[name]
    assert found.delay_steps(8) == state.delay
    assert found.fragments == state.fragments
    # The wire, the vectors, and the momentum of DiLoCo's outer SGD.
    assert found.models == 1 + len(state.vectors) + isinstance(state, commhooks.DiLoCo)


def test_a_blocking_fragment_is_waited_for_like_a_part_of_the_model() -> None:
    whole, parts = Algorithm("", "blocking", 3), Algorithm("", "blocking", 3, fragments=4)
    one, four = (predict(each, 8, WORK, SLOW) for each in (whole, parts))
    assert four.exposed == pytest.approx(one.exposed)
    assert four.sent == one.sent
    assert four.round == WORK.payload / 4


@pytest.mark.parametrize("fragments", [1, 2, 4, 8])
def test_what_one_step_launches_shrinks_with_the_number_of_fragments(fragments: int) -> None:
    whole = predict(BY_NAME["DiLoCo, delay=tau"], 8, WORK, SLOW)
    streaming = predict(Algorithm("", "overlapped", 3, fragments, 1 / fragments), 8, WORK, SLOW)
    assert whole.peak == SLOW.wire_bytes(WORK.payload)
    assert streaming.peak == pytest.approx(whole.peak / fragments)


def test_more_fragments_than_steps_are_launched_together() -> None:
    """Fragment p launches after step ceil(p tau / P): with 8 in 4 steps, two after each."""
    found = predict(Algorithm("", "overlapped", 3, fragments=8, delay=0.25), 4, WORK, SLOW)
    assert found.peak == pytest.approx(SLOW.wire_bytes(WORK.payload) / 4)


def test_a_shorter_delay_hides_less() -> None:
    reduction = SLOW.all_reduce_seconds(WORK.payload)
    for delay, share in ((0, 0.0), (2, 0.25), (4, 0.5), (8, 1.0)):
        found = predict(Algorithm("", "overlapped", 3, delay=share), 8, WORK, SLOW)
        assert found.delay == delay
        assert found.hiding == pytest.approx(delay * WORK.step)
        expected = max(0.0, reduction - delay * WORK.step)
        assert 8 * found.exposed == pytest.approx(expected)


def test_the_hiding_delay_hides_a_fragment_and_no_shorter_one_does() -> None:
    delay = hiding_delay(WORK, SLOW, fragments=4)
    assert delay < hiding_delay(WORK, SLOW) == hiding_tau(WORK, SLOW)
    tau = 4 * delay
    assert predict(Algorithm("", "overlapped", 3, 4, 1 / 4), tau, WORK, SLOW).exposed == 0.0
    shorter = Algorithm("", "overlapped", 3, 4, (delay - 1) / tau)
    assert predict(shorter, tau, WORK, SLOW).exposed > 0.0


@pytest.mark.parametrize("delay", [0.25, 0.5, 1.0])
def test_a_link_that_is_never_idle_sets_the_pace_whatever_the_delay(delay: float) -> None:
    tau, fragments = 4, 4
    found = predict(Algorithm("", "overlapped", 3, fragments, delay), tau, WORK, SLOW)
    rounds = fragments * SLOW.all_reduce_seconds(WORK.payload / fragments)
    assert tau * WORK.step < rounds
    assert tau * found.step == pytest.approx(rounds)


def test_latency_is_paid_once_a_message() -> None:
    slow = Network(ranks=5, bandwidth=1e9, latency=0.01)
    fast = Network(ranks=5, bandwidth=1e9)
    assert slow.all_reduce_seconds(1e6) - fast.all_reduce_seconds(1e6) == pytest.approx(0.08)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        *[("200mbit", 2e8), ("1gbit", 1e9), ("2.5gbit", 2.5e9), ("64kbit", 64e3), ("1e3bit", 1e3)],
        *[("100Mbps", 1e8), ("100mbps", 1e8), ("1Gbps", 1e9), ("10 Gbit/s", 1e10)],
        *[("100Mbit/s", 1e8), ("100 Mbits/s", 1e8), ("100Mb/s", 1e8), ("100MBIT", 1e8)],
        *[("25MB/s", 2e8), ("25 MByte/s", 2e8), ("25MBps", 2e8), ("1.25GB/s", 1e10)],
    ],
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["fast", "200", "mbit", "200MB", "1GBPS", "0mbit", "-1mbit", "1.2.3gbit", "infmbit"]
)
def test_no_rates(text: str) -> None:
    with pytest.raises(ValueError, match="is no rate"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        *[("350M", 350e6), ("1.3B", 1.3e9), ("7b", 7e9), ("64K", 64e3), ("2g", 2e9), ("1T", 1e12)],
        *[("124e6", 124e6), ("124E6", 124e6), ("11000000", 11e6), ("0.35 B", 350e6)],
    ],
)
def test_counts(text: str, count: float) -> None:
    assert parse_count(text) == pytest.approx(count)


@pytest.mark.parametrize("text", ["many", "0", "-1M", "1k5", "M", "inf", "nan", "1e999"])
def test_no_counts(text: str) -> None:
    with pytest.raises(ValueError, match="is no number above 0"):
        parse_count(text)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_islands_are_workers_that_share_out_the_model(algorithm: Algorithm) -> None:
    flat, islands = Network(4, 200e6), Network(16, 200e6, island=4)
    found, expected = (predict(algorithm, 8, WORK, each) for each in (islands, flat))
    assert (found.step, found.sent) == (expected.step, expected.sent)
    if algorithm.kind != "step":
        # A quarter of the vectors, and a model to gather the shares in.
        assert found.memory == pytest.approx(expected.memory / 4 + WORK.payload)


@pytest.mark.parametrize(("compression", "most"), [("bf16", 0.51), ("int8", 0.27), ("int4", 0.14)])
def test_compressed_rounds_send_less_and_keep_more(compression: str, most: float) -> None:
    work = Work(WORK.payload, WORK.step, compression)
    for algorithm in ALGORITHMS:
        plain, found = (predict(algorithm, 8, each, SLOW) for each in (WORK, work))
        if algorithm.kind == "step":
            assert found == plain
        else:
            assert found.sent <= most * plain.sent
            assert found.memory > plain.memory
    assert hiding_tau(work, SLOW) <= hiding_tau(WORK, SLOW)


@pytest.mark.parametrize(("machines", "each"), [(2, 1), (2, 2), (3, 4), (8, 8)])
def test_what_crosses_a_link_is_what_counting_messages_gives(machines: int, each: int) -> None:
    """Machine 0 sends; ranks that are workers by themselves share its link."""
    ranks = machines * each
    network = Network(ranks, 1e9, per_node=each)
    headers = Network(2, 1e9).wire_bytes(1)
    piece = 1000 * headers / ranks
    # A ring passes a piece in each of 2 (m - 1) turns, and leaves a machine at one place.
    assert network.wire_bytes(1000) == pytest.approx(2 * (ranks - 1) * piece)
    # Two shots: a piece to every worker, of which those on the same machine cross no link.
    crossing = sum(to >= each for _ in range(each) for to in range(ranks))
    shots = (crossing + ranks - 1) * piece
    assert network.wire_bytes(1000, two_shots=True) == pytest.approx(shots)


def test_an_island_sends_a_share_a_rank_in_one_shot_or_two() -> None:
    flat, islands = Network(2, 1e9), Network(8, 1e9, island=4, per_node=4)
    for two_shots in (False, True):
        found, expected = (n.wire_bytes(1e6, two_shots=two_shots) for n in (islands, flat))
        # All ranks of a machine together; one of them sends a quarter.
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_the_rate_of_a_measured_time_predicts_this_time(ranks: int) -> None:
    network = Network(ranks, 3e8, latency=1e-4)
    seconds = network.all_reduce_seconds(1e8)
    assert network.rate_of(1e8, seconds) == pytest.approx(network.bandwidth)


def test_a_time_that_is_all_messages_gives_a_rate_too() -> None:
    network = Network(2, 1.0, latency=1e-3)
    assert 0 < network.rate_of(1000, 1e-3) < math.inf


def test_what_joins_a_machine_is_waited_for_where_it_is_slow() -> None:
    local = BY_NAME["LocalSGD"]
    free = predict(local, 8, WORK, Network(8, 1e9, island=4))
    bus = predict(local, 8, WORK, Network(8, 1e9, island=4, inside=1e9))
    fast = predict(local, 8, WORK, Network(8, 1e9, island=4, inside=1e18))
    assert bus.exposed > free.exposed
    assert fast.exposed == pytest.approx(free.exposed)


def test_rounding_takes_time_twice_a_round() -> None:
    network = Network(2, 1e9)
    slow = Work(WORK.payload, WORK.step, "int8", encoding=WORK.payload)
    fast = Work(WORK.payload, WORK.step, "int8")
    assert slow.round_seconds(network) - fast.round_seconds(network) == pytest.approx(2)
    exact = Work(WORK.payload, WORK.step, encoding=WORK.payload)
    assert exact.round_seconds(network) == network.all_reduce_seconds(WORK.payload)
