"""Residuals and references go on bit for bit, or start anew on another number of workers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import commhooks
from tests.cases import Case
from tests.compression.test_trajectories import wide_model
from tests.diloco.family import in_flight
from tests.harness import run_ranks
from tests.test_checkpoint import resumed_at_every_step
from tests.training import Trainer

CASES = [
    case
    for kind in ("int8", "int4")
    for case in in_flight(model=wide_model, compression=kind, cap_mb=25.0)
]


def test_resumes_bit_for_bit_from_every_step() -> None:
    run_ranks(resumed_at_every_step, 3, CASES, "register", timeout=100.0)


def saved_midway(case: Case) -> dict[str, Any]:
    trainer = Trainer(case)
    for _ in range(7):
        trainer.step()
    values = trainer.saved()
    with trainer.state.averaged():
        values["model"] = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    return values


def gone_on(case: Case, values: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    trainer = Trainer(case)
    trainer.go_on(values, 7)
    wires = [fragment["wires"] for fragment in trainer.state.state_dict()["fragments"]]
    return trainer.step(), wires[0]


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_another_number_of_workers(case: Case) -> None:
    values = run_ranks(saved_midway, 2, case)[0]
    for x, wires in run_ranks(gone_on, 3, case, values):
        assert torch.isfinite(x).all()
        assert not any(e.any() for e in (*wires["e"], *wires["E"]))
        old = values["state"]["fragments"][0]["wires"]["r"]
        assert all(torch.equal(a, b) for a, b in zip(wires["r"], old, strict=True))


def refused(case: Case, values: dict[str, Any]) -> str:
    trainer = Trainer(case)
    with pytest.raises(commhooks.CheckpointError) as caught:
        trainer.state.load_state_dict(values["state"])
    return str(caught.value)


def test_what_does_not_fit_is_refused() -> None:
    case = CASES[0]
    values = run_ranks(saved_midway, 1, replace(case, compression=None))
    first, _ = run_ranks(saved_midway, 2, case)
    (message,) = run_ranks(refused, 1, replace(case, compression=None), first)
    assert "'compression': 'int8'" in message
    (message,) = run_ranks(refused, 1, case, values[0])
    assert "'compression': None" in message


def damaged(case: Case) -> list[str]:
    trainer = Trainer(case)
    for _ in range(4):
        trainer.step()
    messages = []
    damages: tuple[Callable[[dict[str, Any]], object], ...] = (
        lambda wires: wires.pop("E"),
        lambda wires: wires["e"].pop(),
        lambda wires: wires["r"][0].fill_(float("nan")),
        lambda wires: wires.update(E=[torch.zeros(3)]),
    )
    for damage in damages:
        values = trainer.saved()["state"]
        damage(values["fragments"][0]["wires"])
        with pytest.raises(commhooks.CheckpointError) as caught:
            trainer.state.load_state_dict(values)
        messages.append(str(caught.value))
    trainer.step()
    return messages


def test_damage_is_named() -> None:
    for messages in run_ranks(damaged, 2, CASES[0]):
        assert all("fragments[0].wires" in message for message in messages)
