"""The rule that says which ranks can never go on, as a table; and the words for what gloo says."""

import pytest

from commhooks.engine.network.deadlock import Awaited, Standing, explained, stuck
from commhooks.engine.network.words import plain


def waits(group: str, number: int, *ranks: int, kind: str = "all_reduce", **begun: int) -> Standing:
    """A rank in that collective, with so many begun on its other groups."""
    awaited = Awaited(group, number, kind, ranks)
    return Standing("there", awaited, {group: number, **begun}, {group: {number: kind}})


def computes(**begun: int) -> Standing:
    return Standing("there", None, begun)


@pytest.mark.parametrize(
    ("standings", "expected"),
    [
        ({0: waits("a", 3, 0, 1, b=1), 1: waits("b", 2, 0, 1, a=2)}, {0: [1], 1: [0]}),
        # Rank 1 computes, or has begun the same: what is sent is on its way.
        ({0: waits("a", 3, 0, 1), 1: computes(a=2)}, {}),
        ({0: waits("a", 3, 0, 1), 1: waits("a", 3, 0, 1)}, {}),
        ({0: waits("a", 3, 0, 1, b=1), 1: waits("b", 2, 0, 1, a=3)}, {}),
        # Nothing is known of rank 1, or of a group that it is in.
        ({0: waits("a", 3, 0, 1)}, {}),
        ({0: waits("a", 3, 0, 1, b=1), 1: waits("b", 2, 0, 1)}, {}),
        # A circle of three, and one who waits for somebody in it.
        (
            {
                0: waits("a", 1, 0, 1, c=0, d=0),
                1: waits("b", 1, 1, 2, a=0),
                2: waits("c", 1, 2, 0, b=0),
                3: waits("d", 1, 0, 3),
            },
            {0: [1], 1: [2], 2: [0], 3: [0]},
        ),
        # A chain that ends at one who computes.
        (
            {0: waits("a", 1, 0, 1), 1: waits("b", 1, 1, 2, a=0), 2: computes(b=0)},
            {},
        ),
        # Rank 1 has gone by, with another kind in the same place.
        (
            {
                0: waits("a", 3, 0, 1, kind="all_gather"),
                1: Standing("there", None, {"a": 5}, {"a": {3: "all_reduce", 5: "all_reduce"}}),
            },
            {0: [1]},
        ),
        # Of kinds that gloo may pair nothing is concluded.
        (
            {
                0: waits("a", 3, 0, 1, kind="sparse_all_reduce"),
                1: Standing("there", None, {"a": 5}, {"a": {3: "all_reduce"}}),
            },
            {},
        ),
    ],
)
def test_stuck(standings: dict[int, Standing], expected: dict[int, list[int]]) -> None:
    assert stuck(standings) == expected


def test_explained_names_every_rank_and_its_place() -> None:
    standings = {
        0: waits("a", 3, 0, 1, kind="all_gather"),
        1: Standing("at loop.py:7", None, {"a": 3}, {"a": {3: "all_reduce"}}),
    }
    text = explained(standings, stuck(standings))
    assert "rank 0 is there and waits for rank 1; rank 1 is at loop.py:7." in text


GLOO = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            f"finish(): Got the following error when running the callback: RuntimeError: {GLOO}"
            "Connection closed by peer [127.0.0.1]:134. This is typically caused by a remote "
            "worker crashing.\n\nAt:\n  ticket.py(130): _fetch\n",
            "finish(): another rank has left: its process has ended or crashed, or the network is "
            "cut. Its own log says why (gloo: Connection closed by peer [127.0.0.1]:134).",
        ),
        (
            f"{GLOO}Timed out waiting 1000ms for recv operation to complete",
            "another rank did not come within the timeout of the process group (gloo: Timed out "
            "waiting 1000ms for recv operation to complete).",
        ),
        ("the parameters hold NaN.", "the parameters hold NaN."),
        (f"{GLOO}something else", f"{GLOO}something else"),
    ],
)
def test_plain(said: str, expected: str) -> None:
    assert plain(said) == expected
    assert plain(expected) == expected
