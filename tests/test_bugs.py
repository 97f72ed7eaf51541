"""Pins bugs that were found once; each test names the mechanism."""

import gc
import time
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import commhooks
from commhooks.engine.vectors.buckets import build_buckets
from tests.cases import ALGORITHMS, Case, one_case
from tests.harness import run_ranks
from tests.late_release import release_callbacks_late
from tests.training import Trainer, make_state, wrapped
from tests.workload import gradient, nesterov_sgd, ragged_model


def step_after_a_bare_state_is_gone(steps: int) -> bool:
    trainer = Trainer(Case("LocalSGD", {"tau": 2}), form="hook")
    for _ in range(steps):
        trainer.step()
    del trainer
    gc.collect()
    model = ragged_model()
    (optimizer,) = nesterov_sgd(model)
    for step in range(1, 3):
        gradient(model, 0, step)
        optimizer.step()
    return True


def test_a_dropped_bare_state_leaves_other_optimizers_alone() -> None:
    """Global optimizer hooks that removed themselves while torch was iterating over them."""
    assert run_ranks(step_after_a_bare_state_is_gone, 2, 4) == [True, True]


def test_a_bare_state_dropped_after_one_step_leaves_no_group_behind() -> None:
    """A global forward hook that waited for the model's second forward kept the state alive.

    The harness looks for its threads and sockets.
    """
    assert run_ranks(step_after_a_bare_state_is_gone, 2, 1) == [True, True]


def rewrapped_with_the_same_optimizer() -> bool:
    """As an error of `register` advises."""
    module = ragged_model()
    (optimizer,) = nesterov_sgd(module)
    engines = []
    for _ in range(2):
        model, state = wrapped(module), make_state(Case("BMUF", {"tau": 1}))
        state.register(model, optimizer)
        gradient(model, 0, 1)
        optimizer.step()
        engines.append(weakref.ref(state._engine))
        assert state.stats.rounds_completed == 1
        del model, state
    # The backend's thread lets go of a round's callback a moment after all have gone on.
    deadline = time.monotonic() + 60
    while any(engine() for engine in engines) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    return not any(engine() for engine in engines)


def test_a_dropped_state_does_not_live_on_in_its_optimizer() -> None:
    """The optimizer's hook held it, with up to three models' worth of vectors."""
    assert run_ranks(rewrapped_with_the_same_optimizer, 2) == [True, True]


def gradients_that_outlive_their_warm_up() -> int:
    state = make_state(Case("LocalSGD", {"tau": 2}), warmup_steps=1)
    model = wrapped(ragged_model(), gradient_as_bucket_view=True)
    buckets: list[weakref.ref[Any]] = []

    def hook(state: commhooks.CommHookState, bucket: Any) -> Any:
        buckets.append(weakref.ref(bucket.buffer()))
        return commhooks.comm_hook(state, bucket)

    del hook.__annotations__["bucket"], hook.__annotations__["return"]
    model.register_comm_hook(state, hook)
    (optimizer,) = nesterov_sgd(model)
    warm_up = 0
    for step in range(1, 5):
        gradient(model, dist.get_rank(), step)
        optimizer.step()
        warm_up = warm_up or len(buckets)
    # The backend's thread lets go of a bucket's callback a moment after all have gone on.
    deadline = time.monotonic() + 10
    while any(bucket() is not None for bucket in buckets[:warm_up]):
        if time.monotonic() > deadline:
            break
        gc.collect()
        time.sleep(0.01)
    return sum(bucket() is not None for bucket in buckets[:warm_up])


def test_gradients_of_warm_up_are_let_go_of() -> None:
    """The last promises to DDP held the buckets, which DDP built anew: a model's worth."""
    assert run_ranks(gradients_that_outlive_their_warm_up, 2) == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_comparing_the_ranks_of_an_island_takes_no_memory(dtype: torch.dtype) -> None:
    """torch sums int32 in a copy of int64: two models' worth at every boundary."""
    (bucket,) = build_buckets([torch.ones(1000, 100, dtype=dtype)], 2**20)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        bits = int(bucket.fingerprint())
    assert max(event.cpu_memory_usage for event in profiler.key_averages()) < 1000
    # One bit of one number makes another.
    bucket.tensors[0][500, 50] = 1 + 2**-23
    assert int(bucket.fingerprint()) != bits


def train_with_callbacks_released_late(algorithm: str) -> None:
    release_callbacks_late()
    trainer = Trainer(one_case(algorithm, 2))
    for _ in range(2):
        trainer.step()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_group_is_never_ended_by_a_thread_of_its_own(algorithm: str) -> None:
    """A callback held the group: a thread that dropped it last waited for itself, and aborted.

    The harness destroys the group while the callbacks are still being let go of.
    """
    run_ranks(train_with_callbacks_released_late, 2, algorithm)
