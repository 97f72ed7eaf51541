"""Pins that a state is plain values until it is registered: pickled, copied, printed."""

import copy
import pickle

import pytest
import torch.distributed as dist

import commhooks
from tests.cases import ALGORITHMS, Case, with_tau
from tests.harness import run_ranks
from tests.training import Trainer, make_state, trajectory


def all_states() -> list[commhooks.CommHookState]:
    return [
        make_state(Case(algorithm, arguments, warmup_steps=3))
        for algorithm in ALGORITHMS
        for arguments in with_tau(algorithm, 4)
    ]


@pytest.mark.parametrize("state", all_states(), ids=repr)
def test_a_copy_has_the_same_hyperparameters(state: commhooks.CommHookState) -> None:
    """No process group exists in this process."""
    assert not dist.is_initialized()
    for twin in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state), copy.copy(state)):
        assert type(twin) is type(state)
        assert twin.hyperparameters() == state.hyperparameters()
        assert twin.bucket_cap_mb == state.bucket_cap_mb
        assert twin.stats == commhooks.Stats()


def plain_states() -> list[commhooks.CommHookState]:
    """Those that were given no function, of which only the name could be written down."""
    return [state for state in all_states() if not isinstance(state, commhooks.DiLoCo)]


@pytest.mark.parametrize("state", plain_states(), ids=repr)
def test_the_representation_is_the_constructor_call(state: commhooks.CommHookState) -> None:
    twin = eval(repr(state), vars(commhooks))
    assert twin.hyperparameters() == state.hyperparameters()


def test_the_representation_says_what_the_outer_optimizer_is() -> None:
    said = repr(commhooks.DiLoCo(tau=4))
    assert said.startswith("DiLoCo(tau=4, outer=")
    assert "torch.optim.sgd.SGD(lr=0.7, momentum=0.9, nesterov=True)" in said


def copies_of_a_registered_state(case: Case) -> bool:
    """A copy of a state in the middle of a run is a new state, with which a new run begins."""
    expected = trajectory(case)
    trainer = Trainer(case)
    for _ in range(5):
        trainer.step()
    for twin in (pickle.loads(pickle.dumps(trainer.state)), copy.deepcopy(trainer.state)):
        again = Trainer(case, state=twin)
        if not all((again.step() == x).all() for x in expected):
            return False
    return True


def test_a_copy_of_a_registered_state_is_not_registered() -> None:
    case = Case("OverlapLocalSGD", {"tau": 2, "beta": 0.5})
    assert run_ranks(copies_of_a_registered_state, 2, case) == [True, True]


def copy_with_group() -> bool:
    state = commhooks.LocalSGD(tau=2, process_group=dist.group.WORLD)
    return pickle.loads(pickle.dumps(state)).process_group is None


def test_a_process_group_is_never_pickled() -> None:
    assert run_ranks(copy_with_group, 1) == [True]
