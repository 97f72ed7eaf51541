"""Runs with figures that can be checked by hand, as if they had been read back from W&B."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison.grid import Cell, Grid, parse_method
from comparison.recorded import RecordedRun
from comparison.results import CellResult

GRID = Grid(
    algorithms=("ddp", "overlap-local-sgd:beta=0.7"),
    tau=(8,),
    partitions=("iid",),
    seeds=(0, 1),
    workers=2,
    options=("--model", "small-cnn"),
)


def recorded(*, counted: bool = True, accuracy: float = 0.9, seconds: float = 10.0) -> RecordedRun:
    """A complete run of 20 steps of 4 workers, evaluated after 10 and 20.

    A worker contributes 1 MB in the first half and 2 MB more in the second, of which a ring of 4
    sends 1.5 times as much.

    Args:
        counted: whether communication is measured.
        accuracy: at the end; half as much in the middle.
        seconds: of training.
    """
    history: list[dict[str, Any]] = []
    for half, payload in ((1, 1e6), (2, 3e6)):
        record: dict[str, Any] = {
            "train/step": 10 * half,
            "time/seconds": seconds * half / 2,
            "eval/loss": 1.0 / half,
            "eval/accuracy": accuracy * half / 2,
        }
        if counted:
            record["comm/bytes_reduced"] = payload
        # Training metrics come more often, in records of their own.
        history += [{"train/step": 10 * half, "train/loss": 1.0}, record]
    return RecordedRun(
        Path("run.wandb"),
        name="a run",
        tags=("link=none",),
        config={"workers": 4, "seed": 0, "versions": {"torch": "2.13"}},
        history=history,
        summary={
            "final/accuracy": accuracy,
            "final/loss": 0.5,
            "final/train_loss": 0.25,
            "final/seconds": seconds,
            "final/seconds_exposed": 0.5 if counted else None,
            "final/seconds_hidden": 1.5 if counted else None,
            "final/megabytes_sent": 4.5,
        },
        exit_code=0,
    )


def result(
    algorithm: str,
    tau: int | None,
    runs: Sequence[RecordedRun],
    *,
    non_iid: bool = False,
    lr: float | None = None,
) -> CellResult:
    """A cell with these runs."""
    cell = Cell(parse_method(algorithm), tau, "major-class" if non_iid else "iid", lr)
    return CellResult(cell, tuple(runs))


def results(taus: Sequence[int] = (2, 8), *, non_iid: bool = True) -> list[CellResult]:
    """Plain DDP and every other algorithm with each tau, on one or two partitions, two seeds."""
    algorithms = (
        *("local-sgd", "overlap-local-sgd", "overlap-local-sgd:beta=0.7"),
        *("easgd", "cocod-sgd", "bmuf"),
    )
    uncounted = [recorded(counted=False, accuracy=a) for a in (0.9, 0.94)]
    counted = [recorded(accuracy=a) for a in (0.8, 0.9)]
    cells = []
    for skewed in (False, True) if non_iid else (False,):
        cells.append(result("ddp", None, uncounted, non_iid=skewed))
        cells += [result(a, tau, counted, non_iid=skewed) for a in algorithms for tau in taus]
    return cells
