"""Pins the GPU path: equations, streams, and a host that never waits for steps it has queued.

Needs one GPU; skipped elsewhere. NCCL takes one rank a GPU, so two ranks share it over gloo, and
over NCCL one rank all-reduces with itself.
"""

import time
import weakref
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import commhooks
from commhooks.engine.network.islands import Layout
from commhooks.engine.network.links import Links
from commhooks.engine.network.report import Report
from commhooks.engine.network.ticket import Point
from commhooks.engine.network.wires import PlainWire
from commhooks.engine.rounds.drift import Drift
from commhooks.engine.rounds.round import Round
from commhooks.engine.vectors.buckets import build_buckets
from tests.cases import Case, two_cases
from tests.expected import assert_follows, reference_trajectory
from tests.harness import run_ranks
from tests.training import Trainer
from tests.workload import batch, ragged_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SLEEP_S = 1.0


def on_the_gpu(dtype: torch.dtype) -> nn.Module:
    return ragged_model(dtype).cuda()


def gradient_on_the_gpu(model: nn.Module, rank: int, step: int) -> None:
    x, y = (t.cuda() for t in batch(rank, step, next(model.parameters()).dtype))
    torch.autograd.backward(nn.functional.mse_loss(model(x), y))


def trajectories_on_the_gpu(cases: Sequence[Case], stream_of_its_own: bool) -> list[list[Tensor]]:
    stream = torch.cuda.current_stream()
    if stream_of_its_own:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    runs = []
    with torch.cuda.stream(stream):
        for case in cases:
            trainer = Trainer(case)
            runs.append([trainer.step().cpu() for _ in range(case.steps)])
            with trainer.state.averaged():
                pass
            trainer.state.state_dict()
            trainer.state.finish()
    return runs


@pytest.mark.parametrize("stream_of_its_own", [False, True])
def test_two_ranks_over_gloo_follow_the_equations(stream_of_its_own: bool) -> None:
    cases = two_cases(
        model=on_the_gpu, backward=gradient_on_the_gpu, dtype=torch.float64, warmup_steps=1
    )
    ranks = run_ranks(trajectories_on_the_gpu, 2, cases, stream_of_its_own, tidy=False)
    for case, *real in zip(cases, *ranks, strict=True):
        expected = [[x.cpu() for x in step] for step in reference_trajectory(case, 2)]
        assert_follows(case, real, expected)


def start_nccl(folder: str) -> None:
    dist.init_process_group(
        "nccl",
        init_method=f"file://{folder}/nccl",
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=60),
    )


def trajectories_over_nccl(cases: Sequence[Case], folder: str) -> list[list[Tensor]]:
    start_nccl(folder)
    return trajectories_on_the_gpu(cases, stream_of_its_own=False)


def test_one_rank_over_nccl_follows_the_equations(tmp_path: Path) -> None:
    cases = two_cases(model=on_the_gpu, backward=gradient_on_the_gpu, dtype=torch.float64)
    (runs,) = run_ranks(
        trajectories_over_nccl, 1, cases, str(tmp_path), initialise=False, tidy=False
    )
    for case, real in zip(cases, runs, strict=True):
        expected = [[x.cpu() for x in step] for step in reference_trajectory(case, 1)]
        assert_follows(case, [real], expected)


def sleep_on_the_gpu() -> None:
    """Keep the current stream busy for about `SLEEP_S` on any GPU of up to 2 GHz."""
    torch.cuda._sleep(int(SLEEP_S * 2e9))  # type: ignore[no-untyped-call]


def host_seconds_around_a_round(folder: str) -> dict[str, float]:
    """Launched behind queued work and waited for with more queued since; neither may block."""
    start_nccl(folder)
    owner = object()
    links = Links(dist.group.WORLD, owner, Layout(((0,),), 0))  # type: ignore[arg-type]
    # Alone it would not communicate.
    own = dist.new_group([0], backend="nccl")
    links.everyone._own = weakref.ref(own)
    state = commhooks.OverlapLocalSGD(tau=1, beta=0.7)
    buckets = build_buckets([torch.ones(1000, device="cuda")], 2**20)
    for bucket in buckets:
        bucket.allocate(("wire", *state.vectors))
        bucket.vectors["wire"].fill_(3.0)

    def one_round() -> Round:
        return Round(
            Point("a round", 1, 1),
            torch.device("cuda"),
            buckets,
            [PlainWire(links.peers, bucket.vectors["wire"]) for bucket in buckets],
            links,
            state,
            None,
            [torch.ones((), device="cuda")],
            report=Report(),
            drifts=[Drift(bucket, "z", differences=False, stride=1) for bucket in buckets],
        )

    assert one_round().wait() is None  # NCCL sets itself up
    torch.cuda.synchronize()
    began = time.perf_counter()
    sleep_on_the_gpu()
    a_round = one_round()
    launched = time.perf_counter()
    deadline = launched + 60
    while not a_round.done and time.perf_counter() < deadline:
        time.sleep(0.01)
    arrived = time.perf_counter()
    sleep_on_the_gpu()
    assert a_round.wait() is None
    waited = time.perf_counter()
    torch.cuda.synchronize()
    slept = time.perf_counter()
    return {
        "launch": launched - began,
        "in flight": arrived - launched,
        "wait": waited - arrived,
        "sleep": slept - waited,
        "counted in flight": a_round.arrived.seconds_since(a_round.launched),
    }


def test_the_host_waits_for_no_step_that_it_has_queued(tmp_path: Path) -> None:
    """Halves of a sleep that the GPU really makes, not of a clock's: it cannot be too slow."""
    (seconds,) = run_ranks(
        host_seconds_around_a_round, 1, str(tmp_path), initialise=False, tidy=False
    )
    assert seconds["launch"] < seconds["in flight"]
    assert seconds["wait"] < seconds["sleep"] / 2
    assert seconds["counted in flight"] < seconds["in flight"]
