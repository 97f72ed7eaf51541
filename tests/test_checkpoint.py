"""Pins state_dict(): saved at any step and loaded into a fresh model, the run goes on bit for bit.

Taking it does not change the run that goes on, and it holds nothing but tensors and plain values.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import commhooks
from tests.cases import ALGORITHMS, Case, with_tau
from tests.harness import rank_outcomes, run_ranks
from tests.training import Form, Trainer, make_state, trajectory
from tests.workload import MakeOptimizers, adamw, nesterov_sgd

WARMUP_STEPS, STEPS = 2, 9


def saved(trainer: Trainer) -> bytes:
    """On disk, as it were."""
    file = io.BytesIO()
    torch.save(trainer.saved(), file)
    return file.getvalue()


def resumed(case: Case, form: Form, step: int, checkpoint: bytes) -> Trainer:
    trainer = Trainer(case, form)
    trainer.go_on(torch.load(io.BytesIO(checkpoint), weights_only=True), step)
    return trainer


class Differs(Exception):
    pass


def resumed_at_every_step(cases: Sequence[Case], form: Form) -> None:
    for case in cases:
        uninterrupted = trajectory(case, form)
        trainer = Trainer(case, form)
        for step, expected in enumerate(uninterrupted, start=1):
            if not torch.equal(trainer.step(), expected):
                raise Differs(f"{case}: checkpoints changed the run itself by step {step}")
            _compare(resumed(case, form, step, saved(trainer)), uninterrupted, step)


def _compare(trainer: Trainer, uninterrupted: Sequence[Tensor], saved_at: int) -> None:
    for step, expected in enumerate(uninterrupted[saved_at:], start=saved_at + 1):
        if not torch.equal(trainer.step(), expected):
            raise Differs(f"{trainer.case}: saved after step {saved_at}, differs at step {step}")


@pytest.mark.parametrize(
    ("optimizers", "form"), [(nesterov_sgd, "register"), (adamw, "register"), (adamw, "hook")]
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_resumed_at_any_step_the_run_is_the_same(
    algorithm: str, optimizers: MakeOptimizers, form: Form
) -> None:
    cases = [
        Case(algorithm, arguments, WARMUP_STEPS, optimizers, steps=STEPS)
        for arguments in with_tau(algorithm, 3)
    ]
    run_ranks(resumed_at_every_step, 2, cases, form, timeout=100.0)


def resumed_before_the_first_step(case: Case) -> bool:
    first = Trainer(case)
    checkpoint = saved(first)
    again = resumed(case, "register", 0, checkpoint)
    return all(torch.equal(first.step(), again.step()) for _ in range(7))


def test_saved_before_the_first_step() -> None:
    case = Case("OverlapLocalSGD", {"tau": 2, "beta": 0.5})
    assert run_ranks(resumed_before_the_first_step, 2, case) == [True, True]


def continued_stats(case: Case) -> tuple[commhooks.Stats, commhooks.Stats]:
    trainer = Trainer(case)
    for _ in range(7):
        trainer.step()
    again = resumed(case, "register", 7, saved(trainer))
    return trainer.state.stats, again.state.stats


def test_counters_go_on() -> None:
    for before, after in run_ranks(continued_stats, 2, Case("CoCoDSGD", {"tau": 2})):
        assert before.step == after.step == 7
        assert before.rounds_launched == after.rounds_launched == 3
        assert before.rounds_completed == after.rounds_completed == 3
        assert before.bytes_reduced == after.bytes_reduced > 0


def averaged_bytes(case: Case) -> tuple[commhooks.Stats, commhooks.Stats]:
    """One more step of the run and of one that resumes, in buckets that are not DDP's first."""
    trainer = Trainer(case)
    for _ in range(3):
        trainer.step()
    again = resumed(case, "register", 3, saved(trainer))
    trainer.step()
    again.step()
    return trainer.state.stats, again.state.stats


def test_counters_go_on_where_gradients_are_averaged() -> None:
    for before, after in run_ranks(averaged_bytes, 3, Case("AllReduce")):
        assert before.step == after.step == 4
        assert before.bytes_reduced == after.bytes_reduced == 4 * 66 * 4
        assert before.seconds_exposed > 0
        assert after.seconds_exposed > 0


def disabled_and_resumed(case: Case) -> bool:
    trainer = Trainer(case)
    for _ in range(5):
        trainer.step()
    trainer.state.disable()
    trainer.step()
    again = resumed(case, "register", 6, saved(trainer))
    return all(torch.equal(trainer.step(), again.step()) for _ in range(6))


def test_a_disabled_state_stays_disabled() -> None:
    assert run_ranks(disabled_and_resumed, 2, Case("EASGD", {"tau": 2})) == [True, True]


def plain_types(case: Case) -> set[str]:
    trainer = Trainer(case)
    for _ in range(4):
        trainer.step()
    return _types(trainer.state.state_dict())


def _types(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        return set().union(*map(_types, value), *map(_types, value.values()))
    if isinstance(value, list | tuple):
        return set().union(*map(_types, value)) if value else set()
    return {type(value).__name__}


def test_tensors_and_plain_values_only() -> None:
    plain = {"Tensor", "str", "int", "float", "bool", "NoneType"}
    for algorithm in ALGORITHMS:
        for arguments in with_tau(algorithm, 2):
            (types,) = run_ranks(plain_types, 1, Case(algorithm, arguments))
            assert types <= plain


def refusals(case: Case, others: Sequence[Case]) -> list[str]:
    """What loading the checkpoint of ``case`` into each other says; the other must be unchanged."""
    trainer = Trainer(case)
    for _ in range(4):
        trainer.step()
    checkpoint = trainer.state.state_dict()
    messages = []
    for each in others:
        other = Trainer(each)
        with pytest.raises(commhooks.CheckpointError) as caught:
            other.state.load_state_dict(checkpoint)
        messages.append(str(caught.value))
    return messages


def spoilt(case: Case, key: str, value: Any) -> str:
    """What loading a checkpoint whose ``key`` is another says; the state goes on as it was."""
    trainer, other = Trainer(case), Trainer(case)
    for _ in range(3):
        trainer.step()
    checkpoint = {**trainer.state.state_dict(), key: value}
    with pytest.raises(commhooks.CheckpointError) as caught:
        other.state.load_state_dict(checkpoint)
    assert torch.equal(other.step(), trajectory(case)[0])
    return str(caught.value)


def test_another_format_is_refused() -> None:
    (message,) = run_ranks(spoilt, 1, Case("LocalSGD", {"tau": 2}), "format", 1)
    assert "format 1, this version of commhooks reads 7" in message


def another_model(dtype: torch.dtype) -> torch.nn.Module:
    return torch.nn.Linear(5, 3, dtype=dtype)


def test_a_foreign_checkpoint_is_refused_by_name() -> None:
    mine = Case("OverlapLocalSGD", {"tau": 2, "alpha": 0.5})
    others = [
        Case("EASGD", {"tau": 2}),
        Case("OverlapLocalSGD", {"tau": 3, "alpha": 0.5}),
        Case("OverlapLocalSGD", {"tau": 2, "alpha": 0.4}),
        Case("OverlapLocalSGD", {"tau": 2, "alpha": 0.5}, model=another_model),
    ]
    for messages in run_ranks(refusals, 2, mine, others):
        algorithm, tau, alpha, shape = messages
        assert "OverlapLocalSGD" in algorithm
        assert "EASGD" in algorithm
        assert "'tau': 2" in tau
        assert "'tau': 3" in tau
        assert "0.4" in alpha
        assert "is of another model: 4 parameters, here 2" in shape


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_another_model_is_refused_whatever_the_state_keeps(algorithm: str) -> None:
    """Local SGD keeps no vector, and the others none before their first local step."""
    (arguments, *_) = with_tau(algorithm, 2)
    mine = Case(algorithm, arguments, warmup_steps=9)
    other = Case(algorithm, arguments, warmup_steps=9, model=another_model)
    for (message,) in run_ranks(refusals, 2, mine, [other]):
        assert "first differ at parameter number 0, [[7, 5]] in the checkpoint" in message


def loaded_before_registering(case: Case, other: Case) -> None:
    """Rank 1 has the checkpoint of another model, which nobody can see before the parameters."""
    trainers = [Trainer(case), Trainer(other)]
    for trainer in trainers:
        trainer.step()
    states = [trainer.state.state_dict() for trainer in trainers]
    state = make_state(case)
    state.load_state_dict(states[dist.get_rank()])
    Trainer(case, state=state)


def test_a_checkpoint_loaded_before_registering_is_refused_on_all_ranks() -> None:
    mine = Case("LocalSGD", {"tau": 2})
    other = Case("LocalSGD", {"tau": 2}, model=another_model)
    for end in rank_outcomes(loaded_before_registering, 2, mine, other, group_timeout=600.0):
        assert isinstance(end.error, commhooks.RegistrationError), end.describe()
        assert "is of another model" in str(end.error)


def loaded_on_one_rank(case: Case) -> None:
    trainer = Trainer(case)
    trainer.step()
    state = make_state(case)
    if dist.get_rank():
        state.load_state_dict(trainer.state.state_dict())
    Trainer(case, state=state)


def test_a_checkpoint_on_one_rank_alone_is_refused() -> None:
    for end in rank_outcomes(loaded_on_one_rank, 2, Case("LocalSGD", {"tau": 2})):
        assert isinstance(end.error, commhooks.RegistrationError), end.describe()
        assert "checkpoint to load: False on rank 0, True on rank 1" in str(end.error)
