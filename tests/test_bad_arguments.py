"""Pins that a constructor refuses every wrong type and range, saying what it wants and got."""

import dataclasses
import math
from typing import Any

import pytest

import commhooks
from tests.cases import PERIODIC

NAN = math.nan
INF = math.inf

ALGORITHMS_WITH = {
    "tau": PERIODIC,
    "alpha": ("OverlapLocalSGD", "EASGD"),
    "beta": ("OverlapLocalSGD",),
    "eta": ("BMUF",),
    "zeta": ("BMUF",),
    "nesterov": ("BMUF",),
}
WRONG = {
    "tau": [0, -1, 1.5, 2.0, "2", None, True, NAN, [2]],
    "alpha": [-0.1, 1.1, "0.5", NAN, INF, True, [0.5]],
    "beta": [-0.1, 1.0, 1, 1.5, "0.5", NAN, None, True],
    "eta": [-0.1, 1.0, 1, 2, "0.5", NAN, True],
    "zeta": [0, -1.0, "1", NAN, INF, None, True],
    "nesterov": [1, 0, "yes", None],
    "warmup_steps": [-1, 1.5, "3", None, True, NAN],
    "bucket_cap_mb": [0, -1, "25", None, NAN, INF, True],
    "process_group": ["world", 0, [0, 1]],
}
RANGES = {
    "tau": "an integer of at least 1",
    "alpha": r"\[0, 1\]",
    "beta": r"\[0, 1\)",
    "eta": r"\[0, 1\)",
    "zeta": "above 0",
    "nesterov": "True or False",
    "warmup_steps": "an integer of at least 0",
    "bucket_cap_mb": "above 0",
    "process_group": "ProcessGroup or None",
}


def wrong_calls() -> list[tuple[str, str, Any]]:
    return [
        (algorithm, name, value)
        for name, values in WRONG.items()
        for algorithm in ALGORITHMS_WITH.get(name, ("AllReduce", *PERIODIC))
        for value in values
    ]


@pytest.mark.parametrize(("algorithm", "name", "value"), wrong_calls())
def test_a_wrong_argument_is_named_with_what_it_must_be(
    algorithm: str, name: str, value: object
) -> None:
    good = {} if algorithm == "AllReduce" else {"tau": 2}
    with pytest.raises(commhooks.HyperParameterError, match=f"{name}.*{RANGES[name]}") as caught:
        getattr(commhooks, algorithm)(**{**good, name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        ("OverlapLocalSGD", {"alpha": 0.0}),
        ("OverlapLocalSGD", {"alpha": 1.0, "beta": 0.0}),
        ("OverlapLocalSGD", {"alpha": 1, "beta": 0}),
        ("EASGD", {"alpha": 0.0}),
        ("EASGD", {"alpha": 1.0}),
        ("EASGD", {"alpha": None}),
        ("BMUF", {"eta": 0.0, "zeta": 1e-9}),
        ("BMUF", {"eta": None, "zeta": 2, "nesterov": True}),
        ("LocalSGD", {"warmup_steps": 0, "bucket_cap_mb": 1}),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(algorithm: str, arguments: dict[str, Any]) -> None:
    state = getattr(commhooks, algorithm)(tau=1, **arguments)
    for name, value in arguments.items():
        assert getattr(state, name) == value


def test_the_defaults_are_the_documented_ones() -> None:
    overlap, bmuf = commhooks.OverlapLocalSGD(tau=8), commhooks.BMUF(tau=8)
    assert (overlap.alpha, overlap.beta) == (0.6, 0.0)
    assert (bmuf.eta, bmuf.zeta, bmuf.nesterov) == (None, 1.0, False)
    assert commhooks.EASGD(tau=8).alpha is None
    assert (overlap.warmup_steps, overlap.bucket_cap_mb, overlap.process_group) == (0, 25.0, None)


@pytest.mark.parametrize("algorithm", PERIODIC)
def test_the_common_options_are_keyword_only(algorithm: str) -> None:
    cls = getattr(commhooks, algorithm)
    own = [field for field in dataclasses.fields(cls) if not field.kw_only]
    with pytest.raises(TypeError, match="positional argument"):
        cls(*range(len(own) + 1))


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="momentum"):
        commhooks.LocalSGD(tau=2, momentum=0.9)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "error",
    ["HyperParameterError", "RegistrationError", "RoundError", "CheckpointError"],
)
def test_errors_are_of_one_family_and_of_a_builtin_one(error: str) -> None:
    kind = getattr(commhooks, error)
    builtin = ValueError if error in ("HyperParameterError", "CheckpointError") else RuntimeError
    assert issubclass(kind, commhooks.CommHooksError)
    assert issubclass(kind, builtin)
