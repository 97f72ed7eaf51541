"""The ranking, against what a reader would say of two rows of its table."""

import math
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import commhooks
from commhooks.plan import (
    ALGORITHMS,
    COMPRESSIONS,
    Algorithm,
    Choice,
    Network,
    Work,
    choices,
    constructor,
    learning_rate,
    predict,
)
from commhooks.plan.table import of_ranking

CHOOSING = Path(__file__).parents[2] / "docs" / "choosing.md"
WORK = Work(payload=496e6, step=0.3)
SLOW = Network(ranks=2, bandwidth=600e6)
LONGEST = 128
# As the first table of the docs calls them.
NAMES = {
    "AllReduce": "[all-reduce]",
    "LocalSGD": "[Local SGD]",
    "BMUF": "[BMUF]",
    "SlowMo": "[SlowMo]",
    "DiLoCo": "[DiLoCo]",
    "OverlapLocalSGD, beta > 0": "`beta=0.7`",
    "OverlapLocalSGD": "`beta=0`",
    "EASGD": "[EASGD]",
    "CoCoDSGD": "[CoCoD-SGD]",
}


def powers(least: float, most: float) -> st.SearchStrategy[float]:
    return st.floats(least, most).map(lambda exponent: 10.0**exponent)


WORKS = st.builds(Work, payload=powers(4, 11), step=powers(-3, 1))


@st.composite
def networks(draw: st.DrawFn) -> Network:
    per_node = draw(st.sampled_from([1, 2, 4, 8]))
    return Network(
        ranks=per_node * draw(st.integers(2, 16)),
        bandwidth=draw(powers(6, 12)),
        latency=draw(st.floats(0, 0.01)),
        per_node=per_node,
        inside=draw(st.one_of(st.just(math.inf), powers(9, 13))),
    )


def columns(choice: Choice) -> tuple[float, ...]:
    """What a user wants little of."""
    found, rounding = choice.prediction, COMPRESSIONS.index(choice.compression)
    return (found.exposed, found.tau, rounding, choice.network.workers, found.memory)


@settings(max_examples=40, deadline=None)
@given(WORKS, networks())
def test_nothing_ranks_above_what_is_better(work: Work, network: Network) -> None:
    ranked = choices(work, network)
    for place, above in enumerate(ranked):
        for below in ranked[place + 1 :]:
            pairs = list(zip(columns(above), columns(below), strict=True))
            assert not all(a > b for a, b in pairs[:3])
            if above.algorithm == below.algorithm:
                assert any(a < b for a, b in pairs) or all(a == b for a, b in pairs)
            assert above.hidden >= below.hidden


@settings(max_examples=40, deadline=None)
@given(WORKS, networks())
def test_every_combination_is_there_once(work: Work, network: Network) -> None:
    ranked = choices(work, network)
    found = {(c.algorithm, c.compression, c.network.island) for c in ranked}
    islands = {1, network.per_node}
    assert len(ranked) == len(found) == (len(ALGORITHMS) - 1) * 4 * len(islands) + 1
    assert {island for _, _, island in found} == islands


@settings(max_examples=100, deadline=None)
@given(WORKS, networks())
def test_the_tau_of_an_overlapped_round_is_the_smallest_with_a_fifth_to_spare(
    work: Work, network: Network
) -> None:
    for choice in choices(work, replace(network, inside=math.inf)):
        algorithm, tau = choice.algorithm, choice.prediction.tau
        if algorithm.kind != "overlapped" or algorithm.fragments > 1:
            continue
        needed = 1.2 * choice.work.round_seconds(choice.network) / work.step
        assert needed * (1 - 1e-9) <= tau or tau == LONGEST
        assert tau - 1 < needed * (1 + 1e-9) or tau == 1


@settings(max_examples=100, deadline=None)
@given(WORKS, networks())
def test_the_tau_of_a_blocking_round_is_the_smallest_that_costs_a_twentieth(
    work: Work, network: Network
) -> None:
    for choice in choices(work, replace(network, inside=math.inf)):
        tau = choice.prediction.tau
        if choice.algorithm.kind != "blocking":
            continue
        needed = choice.work.round_seconds(choice.network) / (0.05 * work.step)
        assert needed * (1 - 1e-9) <= tau or tau == LONGEST
        assert tau - 1 < needed * (1 + 1e-9) or tau == 1


@settings(max_examples=100, deadline=None)
@given(WORKS, networks())
def test_ddp_is_the_first_choice_exactly_where_it_costs_little(
    work: Work, network: Network
) -> None:
    ranked = choices(work, network)
    ddp = next(choice for choice in ranked if choice.algorithm.kind == "step")
    if ddp.prediction.exposed <= 0.05 * work.step:
        assert ranked[0] == ddp
    elif any(choice.hidden for choice in ranked):
        assert ranked[0] != ddp


def test_on_a_fast_link_there_is_nothing_to_gain() -> None:
    ranked = choices(WORK, Network(ranks=16, bandwidth=400e9, per_node=8))
    assert ranked[0].algorithm.name == "AllReduce"
    assert "First choice: plain DDP; there is nothing to gain." in of_ranking(ranked)


def test_a_link_too_slow_for_exact_rounds_is_answered_with_compression() -> None:
    network = Network(ranks=2, bandwidth=20e6)
    needed = 1.2 * network.all_reduce_seconds(WORK.payload) / WORK.step
    assert needed > LONGEST
    first = choices(WORK, network)[0]
    assert first.hidden
    assert first.compression is not None


def test_a_small_tau_is_no_reason_to_round_more() -> None:
    """Here bf16 needs a tau of 15, int8 of 8 and int4 of 4."""
    first = choices(WORK, SLOW)[0]
    assert (first.compression, first.prediction.tau) == ("int8", 8)
    smallest = choices(WORK, SLOW, small=1)[0]
    assert (smallest.compression, smallest.prediction.tau) == ("int4", 4)
    fast = choices(WORK, replace(SLOW, bandwidth=2.2e9))[0]
    assert (fast.compression, fast.prediction.tau) == (None, 8)


def test_the_usual_first_choice_is_the_one_of_the_docs() -> None:
    assert choices(WORK, SLOW)[0].algorithm.name == "OverlapLocalSGD, beta > 0"
    long = choices(WORK, SLOW, small=1, compressions=[None], longest=LONGEST)
    assert long[0].prediction.tau < 50
    slower = choices(WORK, replace(SLOW, bandwidth=200e6), compressions=[None])[0]
    assert slower.prediction.tau >= 50
    assert slower.algorithm.name == "DiLoCo, delay=tau, merge=carry"


def test_less_memory_is_found_where_it_is_asked_for() -> None:
    first = choices(WORK, SLOW, compressions=[None], memory=WORK.payload)[0]
    assert first.algorithm.name == "OverlapLocalSGD"
    assert first.prediction.memory == WORK.payload
    none = choices(WORK, SLOW, memory=1.0)
    assert [choice.algorithm.name for choice in none] == ["AllReduce"]


def test_machines_of_several_ranks_are_one_worker() -> None:
    network = Network(ranks=16, bandwidth=1e9, per_node=8)
    first = choices(WORK, network)[0]
    assert first.network.island == 8
    assert constructor(first).endswith('island="node")')
    flat = next(
        choice
        for choice in choices(WORK, network)
        if (choice.algorithm, choice.compression) == (first.algorithm, first.compression)
        and choice.network.island == 1
    )
    # The vectors of a rank, and of what it sends, are an eighth, besides room for one model.
    share = first.prediction.memory - WORK.payload
    assert share < flat.prediction.memory / 8 * 1.2


def test_a_slow_bus_makes_ranks_workers_by_themselves() -> None:
    network = Network(ranks=4, bandwidth=1e9, per_node=2, inside=1e9)
    assert choices(WORK, network)[0].network.island == 1


@settings(max_examples=40, deadline=None)
@given(WORKS, networks())
def test_a_faster_link_needs_no_larger_tau(work: Work, network: Network) -> None:
    faster = replace(network, bandwidth=2 * network.bandwidth)
    taus = [
        {(c.algorithm, c.compression, c.network.island): c.prediction.tau for c in ranked}
        for ranked in (choices(work, network), choices(work, faster))
    ]
    assert all(taus[1][which] <= tau for which, tau in taus[0].items())


def test_the_constructor_makes_what_was_predicted() -> None:
    for choice in choices(WORK, replace(SLOW, ranks=16, per_node=8), fragments=3):
        state = eval(constructor(choice), {"commhooks": commhooks})
        assert isinstance(state, commhooks.CommHookState)
        found = choice.prediction
        if choice.algorithm.kind == "step":
            assert isinstance(state, commhooks.AllReduce)
            continue
        assert (state.tau, state.delay) == (found.tau, found.delay)
        assert state.fragments == choice.algorithm.fragments
        assert state.compression == choice.compression
        assert state.island == ("node" if choice.network.island > 1 else None)
        assert found == predict(choice.algorithm, found.tau, choice.work, choice.network)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_learning_rates_are_those_of_the_docs(algorithm: Algorithm) -> None:
    table = CHOOSING.read_text().split("times DDP's |\n")[1].split("\n\n")[0]
    kind = algorithm.name if algorithm.name in NAMES else "DiLoCo"
    row = next(line for line in table.splitlines() if NAMES[kind] in line)
    told = row.strip("| ").split("|")[-1].replace("*", "").replace("`", "").strip()
    # Some are told with what they were measured with, in brackets.
    assert learning_rate(algorithm).split(" (")[0] in told


def test_the_table_shows_the_best_of_each_algorithm_and_ddp() -> None:
    ranked = choices(WORK, replace(SLOW, bandwidth=200e6))
    head, *rows = of_ranking(ranked, rows=10).split("\n\n")[0].splitlines()
    assert head.split()[:4] == ["algorithm", "rounds", "island", "tau"]
    assert len(rows) == 11
    assert rows[-1].startswith("plain DDP")
    assert rows[0].startswith(ranked[0].algorithm.name)
    longer = of_ranking(ranked, rows=100).split("\n\n")[0]
    assert all(a.name in longer for a in ALGORITHMS if a.kind != "step")


def test_what_cannot_be_hidden_is_said_to_be_late() -> None:
    ranked = choices(Work(28e9, 0.3), SLOW)
    printed = of_ranking(ranked)
    assert not ranked[0].hidden
    assert "Nothing is hidden with a tau up to 128; the first waits the least." in printed
    exposed = [choice.prediction.exposed for choice in ranked]
    assert exposed == sorted(exposed)
