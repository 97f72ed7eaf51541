"""Pins checkpoints of DiLoCo: outer optimizers, and rounds of several fragments in flight."""

import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import commhooks
from tests.cases import Case
from tests.checkpoint.test_damaged import changed, loaded_into_a_run, same, without_seconds
from tests.checkpoint.test_fresh_processes import assert_same, resume, train_and_save
from tests.diloco.family import ADAMW, streaming
from tests.expected import assert_follows, reference_trajectory, reference_workers
from tests.harness import rank_outcomes, run_ranks
from tests.reference import DiLoCo, write
from tests.test_checkpoint import resumed_at_every_step
from tests.training import Form, Trainer, make_state
from tests.workload import adamw


@pytest.mark.parametrize("form", ["register", "hook"])
def test_resumed_at_any_step_the_run_is_the_same(form: Form) -> None:
    """In warm-up, at launches and landings, and with several fragments in flight."""
    todo = [
        replace(case, dtype=torch.float32, warmup_steps=2, steps=12, optimizers=adamw)
        for case in streaming()
    ]
    run_ranks(resumed_at_every_step, 2, todo, form, timeout=100.0)


def in_flight(cases: Sequence[Case]) -> list[int]:
    """The most rounds that were in flight at once, when a checkpoint could be saved."""
    most = []
    for case in cases:
        trainer = Trainer(case)
        landings = []
        for _ in range(case.steps):
            trainer.step()
            fragments = trainer.state.state_dict()["fragments"]
            landings.append(sum(each["landing"] is not None for each in fragments))
        most.append(max(landings))
    return most


def test_several_are_in_flight_in_these_cases() -> None:
    """Else the tests here would say less than they seem to."""
    assert run_ranks(in_flight, 1, streaming()) == [[2, 3, 2]]


def test_fresh_processes_go_on_bit_for_bit(tmp_path: Path) -> None:
    todo = [replace(case, dtype=torch.float32, warmup_steps=4) for case in streaming()]
    saved = run_ranks(train_and_save, 2, todo, tmp_path)
    for step in (4, 8, 10):
        again = run_ranks(resume, 2, todo, tmp_path, step)
        for before, after in zip(saved, again, strict=True):
            for case, one, other in zip(todo, before, after, strict=True):
                assert_same(case, one[step:], other, f"saved at {step}")


# Another number of workers.


def z_and_outer(state: Mapping[str, Any]) -> list[tuple[list[Tensor], Any]]:
    return [(part["vectors"]["z"], part["kept"]) for part in state["fragments"]]


def save_consensus(cases: Sequence[Case], steps: int) -> list[bytes]:
    """What this rank saves: the consensus model, and its state as it is outside of it."""
    files = []
    for case in cases:
        trainer = Trainer(case)
        for _ in range(steps):
            trainer.step()
        values = {"state": trainer.state.state_dict()}
        with trainer.state.averaged():
            values["model"] = trainer.model.state_dict()
            file = io.BytesIO()
            torch.save(values, file)
        files.append(file.getvalue())
    return files


def go_on(cases: Sequence[Case], files: Sequence[bytes]) -> list[list[Tensor]]:
    """Resume on this number of ranks; z and the outer optimizer's state must be those saved."""
    runs = []
    for case, file in zip(cases, files, strict=True):
        saved = torch.load(io.BytesIO(file), weights_only=True)
        trainer = Trainer(case)
        trainer.model.load_state_dict(saved["model"])
        trainer.state.load_state_dict(saved["state"])
        now = trainer.state.state_dict()
        before, after = z_and_outer(saved["state"]), z_and_outer(now)
        assert all(map(same, before, after)), str(case)
        trainer.steps = now["schedule"]["step"]
        runs.append([trainer.step() for _ in range(9)])
    return runs


def expected_to_go_on(case: Case, steps: int, size: int) -> list[list[Tensor]]:
    """The reference of the new workers, with the algorithm of the two old ones.

    What was in flight has become part of z, and lands in no model: all begin at the consensus.
    """
    old, new = reference_workers(case, 2), reference_workers(case, size)
    for _ in range(steps):
        old.step(case.backward)
    for part in old.algorithm.parts if isinstance(old.algorithm, DiLoCo) else ():
        part.lands_at = None
    for model in new.models:
        write(old.consensus, model.parameters())
    new.algorithm, new.steps = old.algorithm, steps
    return [new.step(case.backward) for _ in range(9)]


@pytest.mark.parametrize("size", [1, 3])
def test_on_another_number_of_workers_z_and_the_outer_state_go_on(size: int) -> None:
    """Saved with rounds of several fragments in flight; any rank's file will do."""
    todo = [*streaming(), Case("SlowMo", {"tau": 3, "beta": 0.7}, dtype=torch.float64)]
    for files in run_ranks(save_consensus, 2, todo, 8):
        ranks = run_ranks(go_on, size, todo, files)
        for case, *real in zip(todo, *ranks, strict=True):
            assert_follows(case, real, expected_to_go_on(case, 8, size))


# Damage.


@pytest.mark.parametrize("form", ["register", "hook"])
def test_damage_is_refused_in_mid_run(form: Form) -> None:
    todo = [
        *(replace(case, steps=8) for case in streaming()[:2]),
        Case("SlowMo", {"tau": 2, "beta": 0.6}, dtype=torch.float64, steps=8),
    ]
    for case, *real in zip(todo, *run_ranks(loaded_into_a_run, 2, todo, form), strict=True):
        assert_follows(case, real, reference_trajectory(case, 2))


def kept_damages(good: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What only the states of these algorithms have, damaged as a whole."""
    for key in ("kept", "rates"):
        at = ("fragments", 0, key)
        if good["fragments"][0][key] is not None:
            yield f"{key} is gone", changed(good, at, None)
        values: list[Any] = [
            "damaged",
            7,
            [],
            {},
            [float("nan")],
            {"state": {}},
            {"param_groups": []},
        ]
        for new in values:
            yield f"{key} is {new}", changed(good, at, new)
    yield "a fragment is gone", {**good, "fragments": good["fragments"][1:]}
    if len(good["fragments"]) > 1:
        yield "fragments are exchanged", {**good, "fragments": good["fragments"][::-1]}


def refused_as_a_whole(case: Case) -> list[str]:
    trainer = Trainer(case)
    for _ in range(5):
        trainer.step()
    good = copy.deepcopy(trainer.state.state_dict())
    x = trainer.x
    wrong = []
    for words, damaged in kept_damages(good):
        try:
            trainer.state.load_state_dict(damaged)
        except commhooks.CheckpointError:
            continue
        except Exception as error:
            wrong.append(f"{words}: {error!r}")
        else:
            wrong.append(f"{words}: taken")
    if not wrong:
        assert same(without_seconds(trainer.state.state_dict()), without_seconds(good))
        assert torch.equal(trainer.x, x)
    return wrong


def test_damage_to_what_is_kept_is_refused() -> None:
    assert run_ranks(refused_as_a_whole, 1, streaming()[0]) == [[]]


def test_damage_to_the_rates_is_refused() -> None:
    case = Case("SlowMo", {"tau": 2, "beta": 0.6})
    assert run_ranks(refused_as_a_whole, 1, case) == [[]]


def damaged_on_one_rank(case: Case) -> None:
    """Before registering, when nobody can know yet; rank 1's outer state is not whole."""
    trainer = Trainer(case)
    for _ in range(5):
        trainer.step()
    good = trainer.state.state_dict()
    state = make_state(case)
    damaged = changed(good, ("fragments", 1, "kept", "state"), {})
    state.load_state_dict(damaged if dist.get_rank() else good)
    Trainer(case, state=state)


def test_damage_on_one_rank_is_refused_on_all() -> None:
    for end in rank_outcomes(damaged_on_one_rank, 2, streaming()[1], group_timeout=600.0):
        assert isinstance(end.error, commhooks.RegistrationError), end.describe()


def other_outer_optimizers(case: Case, others: Sequence[Case]) -> list[str]:
    trainer = Trainer(case)
    for _ in range(5):
        trainer.step()
    saved = trainer.state.state_dict()
    messages = []
    for other in others:
        with pytest.raises(commhooks.CheckpointError) as caught:
            Trainer(other).state.load_state_dict(saved)
        messages.append(str(caught.value))
    return messages


def test_another_outer_optimizer_is_refused_by_name() -> None:
    case, *_ = streaming()
    others = [
        replace(case, arguments={**case.arguments, **other})
        for other in ({"outer": ADAMW}, {"delay": 2}, {"fragments": 3}, {"merge": "carry"})
    ]
    for messages in run_ranks(other_outer_optimizers, 1, case, others):
        for name, message in zip(("outer", "delay", "fragments", "merge"), messages, strict=True):
            assert f"'{name}'" in message, message
