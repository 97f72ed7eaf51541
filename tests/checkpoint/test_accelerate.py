"""Pins ``commhooks.accelerate``: every rank's own state in Accelerate's checkpoints."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import commhooks.accelerate
from commhooks import CheckpointError, RegistrationError
from tests.accelerated import Accelerated, Scaling, normed, tied_model
from tests.cases import ALGORITHMS, Case
from tests.harness import rank_outcomes, run_ranks, scaled
from tests.reference import mean
from tests.workload import adamw, nesterov_sgd, weights_and_biases

STEPS = 11
SAVED = (1, 3, 4, 7)
"""In warm-up, at a boundary of tau=3 (after 1 step of warm-up: 4, 7, 10), between two."""

OVERFLOWS = Scaling({0: [2, 8], 1: [4, 7, 9]})


def cases() -> list[Case]:
    return [
        normed(
            Case(
                algorithm,
                dict(arguments) if algorithm == "AllReduce" else {"tau": 3, **arguments},
                warmup_steps=1,
                optimizers=optimizers,
            )
        )
        for algorithm in ALGORITHMS
        for arguments in ALGORITHMS[algorithm][-1:]
        for optimizers in [nesterov_sgd if len(algorithm) % 2 else adamw]
    ]


def train(case: Case, folder: Path | None, scaling: Scaling | None) -> list[Tensor]:
    """All steps, and the consensus at the end; saves on the way if there is a ``folder``."""
    run = Accelerated(case, scaling)
    steps = []
    for step in range(1, STEPS + 1):
        steps.append(run.step())
        if folder is not None and step in SAVED:
            run.accelerator.save_state(str(folder / str(step)))
            run.accelerator.wait_for_everyone()
    run.state.finish()
    return [*steps, run.x]


def resume(case: Case, folder: Path, step: int, scaling: Scaling | None) -> list[Tensor]:
    """The same from a checkpoint on."""
    run = Accelerated(case, scaling)
    torch.manual_seed(1000)  # nothing may depend on it
    run.go_on_from(str(folder / str(step)), step)
    steps = [run.x, *(run.step() for _ in range(step, STEPS))]
    run.state.finish()
    return [*steps, run.x]


def each(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Several runs in one process; Accelerate keeps what is prepared, so each starts anew."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    results = []
    for each_one in arguments:
        for shared in (AcceleratorState, GradientState, PartialState):
            shared._reset_state()
        results.append(function(*each_one))
    return results


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("scaling", [None, OVERFLOWS], ids=["", "scaler"])
def test_every_algorithm_goes_on_bit_for_bit(tmp_path: Path, scaling: Scaling | None) -> None:
    """In fresh processes, and the run that was saved is the one that was not."""
    todo = cases()
    folders = [tmp_path / str(number) for number in range(len(todo))]
    bare = run_ranks(each, 2, train, [(case, None, scaling) for case in todo])
    saved = run_ranks(each, 2, train, [(c, f, scaling) for c, f in zip(todo, folders, strict=True)])
    for step in SAVED:
        again = run_ranks(
            each, 2, resume, [(c, f, step, scaling) for c, f in zip(todo, folders, strict=True)]
        )
        for rank in range(2):
            for case, one, other, third in zip(
                todo, bare[rank], saved[rank], again[rank], strict=True
            ):
                assert same(one, other), f"{case}: saving changed rank {rank}"
                assert same(one[step - 1 :], third), f"{case}: rank {rank} from step {step}"
    if scaling is None:
        local = [not torch.equal(a[-3], b[-3]) for a, b in zip(*bare, strict=True)]
        assert any(local), "the ranks' models never differed"


def save_and_tell(case: Case, folder: Path) -> Tensor:
    """Rank's own parameters and buffers at the time of saving."""
    run = Accelerated(case)
    for _ in range(4):
        run.step()
    run.accelerator.save_state(str(folder))
    run.accelerator.wait_for_everyone()
    return torch.cat([v.float().reshape(-1) for v in run.model.state_dict().values()])


@pytest.mark.parametrize("model", [None, tied_model], ids=["", "tied"])
def test_the_consensus_model_is_what_a_user_finds(tmp_path: Path, model: Any) -> None:
    from safetensors.torch import load_file

    case = normed(Case("OverlapLocalSGD", {"tau": 3}))
    case = case if model is None else replace(case, model=model)
    own = run_ranks(save_and_tell, 2, case, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if model is not None:
        assert "second.weight" not in weights  # written once, under one of its names
        weights["second.weight"] = weights["first.weight"]
    order = list(case.model(case.dtype).state_dict())
    found = torch.cat([weights[name].float().reshape(-1) for name in order])
    assert not torch.equal(own[0], own[1])
    torch.testing.assert_close(found, mean(own))


def test_tensors_and_plain_values_only(tmp_path: Path) -> None:
    case = normed(Case("BMUF", {"tau": 2}, optimizers=weights_and_biases))
    run_ranks(save_and_tell, 2, case, tmp_path)
    for rank in range(2):
        path = tmp_path / f"commhooks-rank-{rank:05d}-of-00002.pt"
        saved = torch.load(path, weights_only=True)
        assert saved["states"][0]["rank"] == rank
        assert len(saved["optimizers"]) == 2


def vectors(saved: dict[str, Any]) -> dict[str, list[Tensor]]:
    """Those of all parts that a state keeps."""
    parts = saved.get("fragments", [saved])
    return {
        name: [p for part in parts for p in part["vectors"][name]] for name in parts[0]["vectors"]
    }


def resume_elsewhere(case: Case, folder: Path) -> tuple[Tensor, Tensor, int, float, str]:
    """Where a rank of another world starts: its model, its anchor, its optimizer state, the log."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("commhooks").addHandler(handler)
    run = Accelerated(case)
    run.go_on_from(str(folder), 4)
    values = torch.cat([v.float().reshape(-1) for v in run.model.state_dict().values()])
    kept = vectors(run.state.state_dict())
    anchor = torch.cat([p.reshape(-1) for p in kept.get("z", kept.get("wire", []))] or [values])
    moments = sum(len(each.optimizer.state) for each in run.optimizers)
    rate = run.optimizers[0].param_groups[0]["lr"]
    run.step()
    run.state.finish()
    return values, anchor, moments, rate, "\n".join(records)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_another_number_of_ranks_starts_from_the_consensus(tmp_path: Path, size: int) -> None:
    case = normed(Case("OverlapLocalSGD", {"tau": 2, "beta": 0.7}))
    own = run_ranks(save_and_tell, 2, case, tmp_path)
    consensus = mean(own)
    z = torch.load(tmp_path / "commhooks-rank-00000-of-00002.pt", weights_only=True)
    anchor = torch.cat([part.reshape(-1) for part in vectors(z["states"][0])["z"]])
    ends = run_ranks(resume_elsewhere, size, case, tmp_path)
    for values, z_there, moments, rate, _ in ends:
        torch.testing.assert_close(values, consensus)
        assert torch.equal(values, ends[0][0])
        assert torch.equal(z_there, anchor)
        assert moments == 0
        assert rate == pytest.approx(0.05 * 0.9**4)
    assert f"of 2 ranks, this run has {size}" in ends[0][-1]
    assert "state of 1 optimizer(s) was reset" in ends[0][-1]
    assert "The anchor goes on" in ends[0][-1]


def test_vectors_of_one_rank_alone_do_not_travel(tmp_path: Path) -> None:
    case = normed(Case("CoCoDSGD", {"tau": 2}))
    run_ranks(save_and_tell, 2, case, tmp_path)
    ends = run_ranks(resume_elsewhere, 3, case, tmp_path)
    assert "vectors were reset" in ends[0][-1]


def load_only(case: Case, folder: Path) -> bool:
    """Whether a refusal left everything as it was."""
    run = Accelerated(case)
    run.step()
    before = run.x
    with pytest.raises(CheckpointError) as refusal:
        run.accelerator.load_state(str(folder))
    unchanged = torch.equal(run.x, before)
    run.step()
    run.state.finish()
    raise CheckpointError(f"{refusal.value} unchanged: {unchanged}")


BASE = normed(Case("OverlapLocalSGD", {"tau": 2, "alpha": 0.5}))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `BASE` on two ranks, to be copied before it is damaged."""
    folder = tmp_path_factory.mktemp("kept")
    run_ranks(save_and_tell, 2, BASE, folder)
    return folder


@pytest.fixture
def base(kept: Path, tmp_path: Path) -> Path:
    return shutil.copytree(kept, tmp_path / "base")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (replace(BASE, algorithm="EASGD"), "algorithm is 'OverlapLocalSGD' in the checkpoint"),
        (replace(BASE, arguments={"tau": 2, "alpha": 0.4}), "'alpha': 0.5"),
        (replace(BASE, warmup_steps=3), "'warmup_steps': 0"),
        (replace(BASE, model=tied_model), "is of another model"),
        (replace(BASE, optimizers=weights_and_biases), "has 1 optimizers, this run 2"),
    ],
    ids=["algorithm", "alpha", "warm-up", "model", "optimizers"],
)
def test_what_does_not_fit_is_refused_before_anything_changes(
    kept: Path, case: Case, words: str
) -> None:
    for end in rank_outcomes(load_only, 2, case, kept):
        assert isinstance(end.error, CheckpointError), end.describe()
        assert words in str(end.error)
        assert "unchanged: True" in str(end.error)


def remove(path: Path) -> str:
    path.unlink()
    return "is missing"


def cut(path: Path) -> str:
    os.truncate(path, path.stat().st_size // 2)
    return "cannot be read"


def empty(path: Path) -> str:
    path.write_bytes(b"")
    return "cannot be read"


@pytest.mark.parametrize("damage", [remove, cut, empty])
def test_damage_to_one_ranks_file_is_named_on_all(
    base: Path, damage: Callable[[Path], str]
) -> None:
    words = damage(base / "commhooks-rank-00001-of-00002.pt")
    for end in rank_outcomes(load_only, 2, BASE, base):
        assert isinstance(end.error, CheckpointError), end.describe()
        assert str(end.error).startswith("Rank 1: ")
        assert words in str(end.error)
        assert "unchanged: True" in str(end.error)


def save_twice(case: Case, first: Path, second: Path) -> None:
    run = Accelerated(case)
    for folder in (first, second):
        run.step()
        run.accelerator.save_state(str(folder))


def test_ranks_at_different_steps_are_refused(tmp_path: Path) -> None:
    """What is left where saving into a folder that held a checkpoint was cut short."""
    first, second = tmp_path / "first", tmp_path / "second"
    run_ranks(save_twice, 2, BASE, first, second)
    shutil.copy(first / "commhooks-rank-00001-of-00002.pt", second)
    for end in rank_outcomes(load_only, 2, BASE, second):
        assert isinstance(end.error, CheckpointError), end.describe()
        assert "holds the ranks at different steps, [2, 1]" in str(end.error)
        assert "unchanged: True" in str(end.error)


def checkpoint_twice(case: Case) -> None:
    run = Accelerated(case)
    torch.distributed.barrier()  # a rank that raises leaves at once
    commhooks.accelerate.checkpoint(run.accelerator, run.state)


def test_the_same_state_twice_is_refused() -> None:
    for end in rank_outcomes(checkpoint_twice, 2, BASE):
        assert isinstance(end.error, RegistrationError), end.describe()
        assert "checkpoints this state already" in str(end.error)


def test_a_checkpoint_of_accelerate_alone_is_refused(base: Path) -> None:
    for path in base.glob("commhooks-rank-*"):
        path.unlink()
    for end in rank_outcomes(load_only, 2, BASE, base):
        assert "was not saved with commhooks.accelerate.checkpoint" in str(end.error)


def test_saving_over_a_checkpoint_of_other_ranks_leaves_none_of_theirs(tmp_path: Path) -> None:
    run_ranks(save_and_tell, 3, BASE, tmp_path)
    run_ranks(save_and_tell, 2, BASE, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("commhooks-*")) == [
        "commhooks-objects-rank-00000-of-00002.pkl",
        "commhooks-objects-rank-00001-of-00002.pkl",
        "commhooks-rank-00000-of-00002.pt",
        "commhooks-rank-00001-of-00002.pt",
    ]


def test_the_library_alone_does_not_import_accelerate() -> None:
    program = "import sys, commhooks, commhooks.accelerate; sys.exit('accelerate' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=scaled(60))
