"""Pins that a damaged state dictionary is refused by name, and that nothing has changed then."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import commhooks
from tests.cases import Case
from tests.expected import assert_follows, reference_trajectory
from tests.harness import run_ranks
from tests.training import Form, Trainer, make_state

Path = tuple[Any, ...]


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Everything in nested dictionaries and lists that is neither, with the way to it."""
    if isinstance(value, Mapping | list | tuple):
        for key, inner in branches(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def branches(value: Any) -> Iterator[tuple[Any, Any]]:
    yield from value.items() if isinstance(value, Mapping) else enumerate(value)


def changed(value: Any, path: Path, new: Any) -> Any:
    """``value`` with ``new`` at ``path``; `GONE` takes the entry out."""
    if not path:
        return new
    key, *rest = path
    if isinstance(value, Mapping):
        inside = changed(value[key], tuple(rest), new)
        return {
            k: inside if k == key else v for k, v in value.items() if (k, inside) != (key, GONE)
        }
    inside = changed(value[key], tuple(rest), new)
    parts = [inside if i == key else v for i, v in enumerate(value)]
    return [part for part in parts if part is not GONE]


class _Gone:
    pass


GONE = _Gone()


def damages(good: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each damage in words, and the dictionary with it."""
    yield "no entries", {}
    yield "a list", [good]
    yield "nothing", None
    yield "an unknown entry", {**good, "surplus": 1}
    for key in good:
        yield f"without {key}", {k: v for k, v in good.items() if k != key}
        if not isinstance(good[key], list):
            yield f"{key} is None", {**good, key: None}
        yield f"{key} is a word", {**good, key: "damaged"}
    for path, value in leaves(good):
        name = ".".join(map(str, path))
        for words, new in _damaged(value):
            yield f"{name} {words}", changed(good, path, new)
        if isinstance(value, Tensor):
            yield f"{name} is missing", changed(good, path, GONE)
            holder: Any = good
            for key in path[:-1]:
                holder = holder[key]
            more = {**holder, "unknown": value} if isinstance(holder, dict) else [*holder, value]
            yield f"{name} has an unknown neighbour", changed(good, path[:-1], more)


def _damaged(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        yield "has another dtype", value.to(torch.int32)
        yield "has another shape", torch.zeros(value.numel() + 1, dtype=value.dtype)
        yield "has no numbers", torch.zeros(0, dtype=value.dtype)
        yield "holds NaN", torch.full_like(value, float("nan"))
        yield "holds inf", value.clone().index_fill_(0, torch.tensor([0]), float("inf"))
        yield "is a list", value.tolist()
    elif isinstance(value, int | float):
        yield "is a word", str(value)
        yield "is a list", [value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield "is below zero", -1 - value
        yield "is NaN", float("nan")
        if isinstance(value, int):
            yield "is no integer", value + 0.5


def zeroed(value: Any, name: str) -> Any:
    """With 0 under every key of that ``name``."""
    if isinstance(value, dict):
        return {k: 0 if k == name else zeroed(v, name) for k, v in value.items()}
    return value


def same(a: Any, b: Any) -> bool:
    ours, theirs = list(leaves(a)), list(leaves(b))
    return [path for path, _ in ours] == [path for path, _ in theirs] and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y
        for (_, x), (_, y) in zip(ours, theirs, strict=True)
    )


def taken(load: Callable[[Any], object], good: dict[str, Any]) -> list[str]:
    """The damages that ``load`` did not refuse as it should."""
    todo = list(damages(good))
    if "tau" in good["hyperparameters"]:
        todo.append(("tau is 0", zeroed(good, "tau")))
    wrong = []
    for words, damaged in todo:
        try:
            load(damaged)
        except (commhooks.CheckpointError, commhooks.RegistrationError):
            continue
        except Exception as error:
            wrong.append(f"{words}: {error!r}")
        else:
            wrong.append(f"{words}: taken")
    return wrong


def without_seconds(state: dict[str, Any]) -> dict[str, Any]:
    """Clocks go on; everything else has to stay."""
    return {k: v for k, v in state.items() if k != "meter"}


def loaded_into_a_run(cases: Sequence[Case], form: Form) -> list[list[Tensor]]:
    """Every damage, one after the other, in the middle of a run that then goes on."""
    runs = []
    for case in cases:
        trainer = Trainer(case, form)
        steps = [trainer.step() for _ in range(3)]
        good = copy.deepcopy(trainer.state.state_dict())
        wrong = taken(trainer.state.load_state_dict, good)
        assert not wrong, f"{case}: {len(wrong)} of {len(list(damages(good)))}: {wrong[:40]}"
        assert same(without_seconds(trainer.state.state_dict()), without_seconds(good))
        runs.append(steps + [trainer.step() for _ in range(case.steps - 3)])
    return runs


CASES = [
    Case("LocalSGD", {"tau": 2}, steps=6),
    Case("OverlapLocalSGD", {"tau": 2, "beta": 0.5}, steps=6),
    Case("BMUF", {"tau": 2}, warmup_steps=1, steps=6),
    Case("AllReduce", steps=6),
]


@pytest.mark.parametrize("form", ["register", "hook"])
def test_damage_is_refused_in_mid_run(form: Form) -> None:
    for case, *real in zip(CASES, *run_ranks(loaded_into_a_run, 2, CASES, form), strict=True):
        assert_follows(case, real, reference_trajectory(case, 2))


def kept_for_registration(cases: Sequence[Case]) -> list[str]:
    """Loaded before it is registered, a state refuses it then at the latest. On one rank alone."""
    wrong = []
    for case in cases:
        trainer = Trainer(case)
        for _ in range(3):
            trainer.step()
        good = copy.deepcopy(trainer.state.state_dict())

        def load(damaged: Any, case: Case = case) -> None:
            state = make_state(case)
            state.load_state_dict(damaged)
            Trainer(case, state=state)

        wrong += [f"{case}: {each}" for each in taken(load, good)]
    return wrong


def test_damage_is_refused_at_registration() -> None:
    assert run_ranks(kept_for_registration, 1, CASES[1:3]) == [[]]
