"""``--measure`` over real processes: what the ranks agree on, and how they fail together."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from commhooks import plan
from commhooks.plan.measure import Launch, Measured, MeasureError, figures, launched
from tests.harness import run_ranks
from tests.harness.script import ScriptFailed, run_script

MEASURE = ["--measure", "--params", "1e5"]
# As `python -m commhooks.plan`, and sees that the process group is gone.
PROGRAM = """
import torch.distributed as dist
from commhooks.plan import main
try:
    main()
finally:
    assert not dist.is_initialized()
"""
STEPS = """
import os
import torch

weight = torch.ones(64, 64, requires_grad=True)
number = 3

def step():
    (weight @ weight).sum().backward()

def fails_on_rank_1():
    if os.environ["RANK"] == "1":
        raise ValueError("no data here")
"""
ENVIRONMENT = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def measured(folder: Path, *options: str) -> str:
    """What two ranks print, started in a folder that holds the module `steps`."""
    (folder / "program").mkdir()
    script = folder / "program" / "plan.py"
    script.write_text(PROGRAM)
    (folder / "steps.py").write_text(STEPS)
    return run_script(script, [*MEASURE, *options], 2, folder=folder, timeout=60)


def test_rank_0_ranks_for_what_was_measured(tmp_path: Path) -> None:
    printed = measured(tmp_path, "--step-ms", "300")
    assert printed.count("2 ranks over gloo: a link carries") == 1
    assert "a step without communication 300.0 ms (as given)" in printed
    assert printed.count("First choice: ") == 1


def test_a_step_is_measured_too(tmp_path: Path) -> None:
    printed = measured(tmp_path, "--step", "steps:step")
    assert "ms (measured)" in printed
    assert printed.count("First choice: ") == 1


def test_a_fixed_tau_is_shown_for_what_was_measured(tmp_path: Path) -> None:
    printed = measured(tmp_path, "--step-ms", "300", "--tau", "8")
    assert "First choice" not in printed
    assert "The smallest tau that hides it" in printed


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        ("nowhere:step", "No module named 'nowhere'"),
        ("steps:nothing", "has no attribute 'nothing'"),
        ("steps:number", "steps:number is no function"),
    ],
)
def test_every_rank_says_that_there_is_no_step(tmp_path: Path, step: str, complaint: str) -> None:
    with pytest.raises(ScriptFailed) as failed:
        measured(tmp_path, "--step", step)
    lines = [line for line in failed.value.printed.splitlines() if "error: the step" in line]
    assert len(lines) == 2
    assert all(line.count(complaint) == 2 for line in lines)
    assert "Traceback" not in failed.value.printed


def test_every_rank_says_whose_step_failed(tmp_path: Path) -> None:
    with pytest.raises(ScriptFailed) as failed:
        measured(tmp_path, "--step", "steps:fails_on_rank_1")
    message = "a call of steps:fails_on_rank_1 failed: rank 1: ValueError: no data here"
    assert failed.value.printed.count(message) == 2


def on_machines(sizes: list[int]) -> Measured:
    """As if the ranks were on machines of these sizes."""
    rank = dist.get_rank()
    launch = Launch(rank, dist.get_world_size(), rank % sizes[rank], sizes[rank])
    return figures(launch, 1e5, 0.3, torch.device("cpu"))


def test_machines_of_two_ranks_are_measured_between_and_inside() -> None:
    found = run_ranks(on_machines, 4, [2, 2, 2, 2])
    assert all(each == found[0] for each in found)
    network = found[0].network
    assert replace(network, bandwidth=1, latency=0, inside=1) == plan.Network(
        4, 1, per_node=2, inside=1
    )
    assert 0 < network.bandwidth < math.inf
    assert 0 < network.latency < math.inf
    assert 0 < network.inside < math.inf
    assert found[0].step == 0.3


def test_the_ranks_of_one_machine_are_measured_as_they_are() -> None:
    found = run_ranks(on_machines, 2, [2, 2])
    assert found[0] == found[1]
    assert (found[0].network.ranks, found[0].network.per_node) == (2, 1)


def unequal() -> str:
    with pytest.raises(MeasureError) as error:
        on_machines([2, 2, 1])
    return str(error.value)


def test_machines_of_different_sizes_are_refused_on_every_rank() -> None:
    assert run_ranks(unequal, 3) == ["the machines hold different numbers of ranks, [1, 2]"] * 3


def test_a_launch_is_what_the_launcher_says() -> None:
    environment = ENVIRONMENT | {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2"}
    launch = launched(environment | {"LOCAL_RANK": "1"})
    assert launch == Launch(rank=5, ranks=6, local_rank=1, per_node=2)
    assert [list(ranks) for ranks in launch.machines] == [[0, 1], [2, 3], [4, 5]]
    assert [list(ranks) for ranks in launch.peers] == [[0, 2, 4], [1, 3, 5]]


def test_without_a_launcher_it_says_how_to_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as end:
        plan.main([*MEASURE, "--step-ms", "300"])
    assert end.value.code == 1
    message = capsys.readouterr().err
    assert "no launcher has set RANK, WORLD_SIZE" in message
    assert "torchrun --nproc-per-node 2 -m commhooks.plan --measure" in message


def test_one_rank_has_nothing_to_measure() -> None:
    with pytest.raises(MeasureError, match="2 ranks at least"):
        launched(ENVIRONMENT | {"RANK": "0", "WORLD_SIZE": "1"})
