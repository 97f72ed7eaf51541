"""Pins checkpoints of islands: bit for bit on the same ranks, and on others with what still fits.

A rank's vectors are its share of the model. They fit every rank at the same place in an island of
the same size, however many islands there are; of another size, nobody.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from commhooks import CheckpointError
from tests.accelerated import normed
from tests.cases import Case
from tests.checkpoint.test_accelerate import resume_elsewhere, save_and_tell, vectors
from tests.checkpoint.test_damaged import same
from tests.checkpoint.test_fresh_processes import assert_same, resume, train_and_save
from tests.diloco.family import streaming
from tests.diloco.test_checkpoints import save_consensus, z_and_outer
from tests.expected import assert_follows, reference_workers
from tests.harness import run_ranks
from tests.optimizers.warnings_of import logged_warnings
from tests.reference import DiLoCo, Workers, mean, write
from tests.test_checkpoint import resumed_at_every_step
from tests.training import Trainer
from tests.workload import adamw


def in_islands() -> list[Case]:
    """Blocking, overlapped, and with several rounds in flight at once; all can travel."""
    some = [
        Case("OverlapLocalSGD", {"tau": 3, "alpha": 0.5, "beta": 0.7}, dtype=torch.float64),
        Case("SlowMo", {"tau": 3, "beta": 0.7}, dtype=torch.float64),
    ]
    return [replace(case, island=2) for case in [*streaming(), *some]]


def test_resumed_at_any_step_the_run_is_the_same() -> None:
    todo = [replace(case, steps=10, optimizers=adamw) for case in in_islands()[1:3]]
    todo.append(Case("CoCoDSGD", {"tau": 3}, island=2, steps=7))
    run_ranks(resumed_at_every_step, 4, todo, "register", timeout=100.0)


def test_fresh_processes_go_on_bit_for_bit(tmp_path: Path) -> None:
    todo = [replace(case, steps=12) for case in in_islands()]
    saved = run_ranks(train_and_save, 4, todo, tmp_path)
    for step in (4, 8):
        again = run_ranks(resume, 4, todo, tmp_path, step)
        for before, after in zip(saved, again, strict=True):
            for case, one, other in zip(todo, before, after, strict=True):
                assert_same(case, one[step:], other, f"saved at {step}")


# Other ranks.

SAVED = 8
"""Steps after which to save."""


class Elsewhere(NamedTuple):
    """The steps after the resume, whether z and the outer state are those saved, and the log."""

    steps: list[Tensor]
    kept: bool
    warnings: str


def go_on(cases: Sequence[Case], saved: Sequence[Sequence[bytes]], at: int) -> list[Elsewhere]:
    """Resume each case from the file of a saved rank: the first of ``at`` at this rank's place."""
    runs = []
    for number, case in enumerate(cases):
        file = saved[(dist.get_rank() + at) % len(saved)][number]
        values = torch.load(io.BytesIO(file), weights_only=True)
        trainer = Trainer(case)
        trainer.model.load_state_dict(values["model"])
        with logged_warnings() as texts:
            trainer.state.load_state_dict(values["state"])
        now = trainer.state.state_dict()
        kept = now["started"] and all(map(same, _travels(values["state"]), _travels(now)))
        trainer.steps = now["schedule"]["step"]
        steps = [trainer.step() for _ in range(9)]
        trainer.state.finish()
        runs.append(Elsewhere(steps, kept, "\n".join(texts)))
    return runs


def _travels(state: Mapping[str, Any]) -> list[Any]:
    if state["algorithm"] == "DiLoCo":
        return z_and_outer(state)
    return [part["vectors"] for part in state["fragments"]]


def expected(
    case: Case, saved_on: int, goes_on_on: int, *, anew: bool = False
) -> list[list[Tensor]]:
    """The reference of the new islands, which all begin at the consensus of the old ones.

    With the old ones' algorithm, unless it starts ``anew``. What was in flight has become part of
    z, and lands in no model.
    """
    old, new = _trained(replace(case, island=2), saved_on), reference_workers(case, goes_on_on)
    for model in new.models:
        write(old.consensus, model.parameters())
    if anew:
        new.algorithm.start(new.x, dict(new.models[0].named_parameters()))
    else:
        new.algorithm = old.algorithm
        for part in old.algorithm.parts if isinstance(old.algorithm, DiLoCo) else ():
            part.lands_at = None
    new.steps = SAVED
    steps = [new.step(case.worker_backward) for _ in range(9)]
    return [[x for x in each for _ in range(case.island)] for each in steps]


def _trained(case: Case, size: int) -> Workers:
    workers = reference_workers(case, size)
    for _ in range(SAVED):
        workers.step(case.worker_backward)
    return workers


@pytest.mark.parametrize(("before", "now"), [(4, 2), (2, 4)])
def test_on_another_number_of_islands_the_anchor_goes_on(before: int, now: int) -> None:
    """Saved with rounds of several fragments in flight; a rank of any island has the share."""
    todo = in_islands()
    saved = run_ranks(save_consensus, before, todo, SAVED)
    for at in range(0, before, 2):
        for case, *ranks in zip(todo, *run_ranks(go_on, now, todo, saved, at), strict=True):
            assert all(run.kept for run in ranks), str(case)
            for run in ranks:
                assert f"of {before} ranks in islands of 2" in run.warnings
                assert "The anchor goes on." in run.warnings
            assert_follows(case, [run.steps for run in ranks], expected(case, before, now))


@pytest.mark.parametrize(("now", "island"), [(4, 4), (4, 1), (2, 1)])
def test_in_islands_of_another_size_it_starts_anew(now: int, island: int) -> None:
    todo = [replace(case, island=island) for case in in_islands()]
    saved = run_ranks(save_consensus, 4, in_islands(), SAVED)
    for case, *ranks in zip(todo, *run_ranks(go_on, now, todo, saved, 0), strict=True):
        for run in ranks:
            assert not run.kept
            assert "of 4 ranks in islands of 2" in run.warnings
            assert f"this run has {now} in islands of {island};" in run.warnings
            assert "it starts anew from the parameters" in run.warnings
        real = [run.steps for run in ranks]
        assert_follows(case, real, expected(case, 4, now, anew=True))


def test_vectors_of_one_worker_alone_do_not_travel() -> None:
    todo = [Case("CoCoDSGD", {"tau": 3}, dtype=torch.float64, island=2)]
    saved = run_ranks(save_consensus, 4, todo, SAVED)
    ends = run_ranks(go_on, 2, todo, saved, 0)
    for run in (runs[0] for runs in ends):
        assert "it starts anew from the parameters" in run.warnings
    real = [runs[0].steps for runs in ends]
    assert_follows(todo[0], real, expected(todo[0], 4, 2, anew=True))


def given_another_place(cases: Sequence[Case], saved: Sequence[Sequence[bytes]]) -> list[str]:
    """Rank 0's dictionary everywhere; where it is refused, that of the right rank after it."""
    messages = []
    for number, case in enumerate(cases):
        trainer = Trainer(case)
        good, zero = (torch.load(io.BytesIO(saved[rank][number])) for rank in (dist.get_rank(), 0))
        trainer.model.load_state_dict(zero["model"])
        try:
            trainer.state.load_state_dict(zero["state"])
            messages.append("")
        except CheckpointError as error:
            messages.append(str(error))
            assert trainer.state.stats.step == 0
            trainer.state.load_state_dict(good["state"])
        for _ in range(4):
            trainer.step()
        trainer.state.finish()
    return messages


def test_a_dictionary_of_another_place_is_refused() -> None:
    """Half of an island would have gone on, and half started anew."""
    todo = in_islands()[2:]
    saved = run_ranks(save_consensus, 4, todo, SAVED)
    first, second = run_ranks(given_another_place, 2, todo, saved)
    assert not any(first)
    for message in second:
        assert "of a rank at place 0 of an island of 2, and this rank is at place 1" in message
        assert "such as rank 1's" in message


# Through Accelerate.


def anchors(folder: Path, size: int) -> list[Tensor]:
    """Of every rank that has saved: its share of z."""
    paths = [folder / f"commhooks-rank-{rank:05d}-of-{size:05d}.pt" for rank in range(size)]
    states = [torch.load(path, weights_only=True)["states"][0] for path in paths]
    return [torch.cat([part.reshape(-1) for part in vectors(each)["z"]]) for each in states]


@pytest.mark.parametrize(("before", "now"), [(4, 2), (2, 4), (4, 4)])
def test_accelerate_gives_every_rank_the_share_of_its_place(
    tmp_path: Path, before: int, now: int
) -> None:
    """Of all else, a checkpoint of other ranks gives rank 0's."""
    case = replace(normed(Case("OverlapLocalSGD", {"tau": 2, "beta": 0.7})), island=2)
    own = run_ranks(save_and_tell, before, case, tmp_path)
    saved = anchors(tmp_path, before)
    assert not torch.equal(saved[0], saved[1])
    ends = run_ranks(resume_elsewhere, now, case, tmp_path)
    for rank, (values, anchor, moments, _, log) in enumerate(ends):
        assert torch.equal(anchor, saved[rank % before])
        if before != now:
            torch.testing.assert_close(values, mean(own))
            assert moments == 0
            assert "The anchor goes on" in log
        else:
            assert torch.equal(values, own[rank])
            assert moments > 0


def test_accelerate_in_islands_of_another_size(tmp_path: Path) -> None:
    """All ranks start anew from the consensus model, whoever's file they are given."""
    case = normed(Case("OverlapLocalSGD", {"tau": 2, "beta": 0.7}))
    own = run_ranks(save_and_tell, 4, replace(case, island=2), tmp_path)
    for now, island in ((2, 1), (3, 3)):
        for values, anchor, *_, log in run_ranks(
            resume_elsewhere, now, replace(case, island=island), tmp_path
        ):
            torch.testing.assert_close(values, mean(own))
            assert anchor.numel() == values.numel()  # nothing is kept yet
            assert "it starts anew from the parameters" in log
