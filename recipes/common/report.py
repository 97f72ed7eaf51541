"""What a run came to: as a table for its user, as JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = [
    "Results",
    "read_json",
    "read_results",
    "results_table",
    "show_results",
    "write_json",
    "write_results",
]

_MEGA = 1e6


@dataclass(frozen=True)
class Results:
    """The figures of one finished run.

    Attributes:
        name: name of the run.
        algorithm: its name among the options.
        workers: processes that trained together.
        steps: optimizer steps.
        samples: samples seen by all workers together.
        train_loss: mean over all workers since the evaluation before the last (an epoch, unless
            --eval-every says otherwise), of the local models.
        loss: test loss of the consensus model.
        accuracy: test accuracy of the consensus model, in [0, 1]; None where there are no classes.
        bits_per_byte: of the consensus model on the test text; None where there is no text.
        seconds: training time of the slowest worker, evaluation not counted.
        seconds_exposed: time a worker's training thread waited for communication, mean over
            workers; None where nobody measured it.
        seconds_hidden: time communication was in flight while training went on, likewise.
        bytes_sent: what a ring all-reduce of the payloads puts on one worker's link; with islands,
            what one of its ranks sends to the other islands.
        rounds: parameter averagings completed; None where there is no such thing.
        wandb_dir: folder of the W&B run; None where there is none.
        config: all options and versions.
        label_counts: samples of each label in each worker's share, (workers, classes).
    """

    name: str
    algorithm: str
    workers: int
    steps: int
    samples: int
    train_loss: float
    loss: float
    accuracy: float | None
    seconds: float
    seconds_exposed: float | None
    seconds_hidden: float | None
    bytes_sent: float
    rounds: int | None
    wandb_dir: str | None
    config: dict[str, Any] = field(default_factory=dict)
    label_counts: list[list[int]] = field(default_factory=list)
    bits_per_byte: float | None = None

    def headline(self) -> dict[str, float | None]:
        """The figures that runs are compared by."""
        return {
            "train_loss": self.train_loss,
            "loss": self.loss,
            "accuracy": self.accuracy,
            "bits_per_byte": self.bits_per_byte,
            "seconds": self.seconds,
            "seconds_exposed": self.seconds_exposed,
            "seconds_hidden": self.seconds_hidden,
            "megabytes_sent": self.bytes_sent / _MEGA,
        }


def write_results(results: Results, path: Path) -> None:
    """Write ``results`` to ``path``, which then holds all of them or, after a crash, none."""
    write_json(asdict(results), path)


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write ``content`` to ``path``, which then holds all of it or, after a crash, nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`write_json` wrote."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def read_results(path: Path) -> Results:
    """What :func:`write_results` wrote."""
    return Results(**read_json(path))


def results_table(runs: Sequence[Results], title: str) -> Table:
    """The figures of some runs side by side, one column a run."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("")
    for run in runs:
        table.add_column(run.algorithm, justify="right")
    rows: list[tuple[str, list[str]]] = [
        ("training loss (last epoch)", [f"{run.train_loss:.4f}" for run in runs]),
        ("test loss, consensus model", [f"{run.loss:.4f}" for run in runs]),
        ("test accuracy, consensus model", [_or_dash(run.accuracy, ".1%") for run in runs]),
        ("bits per byte, consensus model", [_or_dash(run.bits_per_byte, ".3f") for run in runs]),
        ("optimizer steps", [f"{run.steps:,}" for run in runs]),
        ("training time (s)", [f"{run.seconds:.1f}" for run in runs]),
        ("communication exposed (s)", [_or_dash(run.seconds_exposed, ".2f") for run in runs]),
        ("communication hidden (s)", [_or_dash(run.seconds_hidden, ".2f") for run in runs]),
        ("sent per worker (MB)", [f"{run.bytes_sent / _MEGA:,.1f}" for run in runs]),
    ]
    for label, figures in rows:
        # Images have no bits per byte, text no accuracy.
        if "consensus" in label and set(figures) == {"-"}:
            continue
        table.add_row(label, *figures)
    if any(run.seconds_exposed is None for run in runs):
        table.caption = "-: not measured, plain DDP keeps no count"
    return table


def show_results(results: Results) -> None:
    """Print one run's table, and where its records are."""
    console = Console()
    console.print()
    console.print(results_table([results], f"{results.name}, {results.workers} workers"))
    if results.wandb_dir is not None:
        console.print(f"W&B run: {results.wandb_dir}", soft_wrap=True, highlight=False)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
