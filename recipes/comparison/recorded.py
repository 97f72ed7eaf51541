"""Runs read back from their offline W&B files, by the tool that W&B has for that."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["RecordedRun", "matching", "read_run", "read_runs"]

_TIMEOUT_S = 120.0


@dataclass
class RecordedRun:
    """What one file holds.

    Attributes:
        file: the file.
        name: the run's name.
        tags: its tags.
        config: its configuration.
        history: its records, as they were logged.
        summary: last value of every metric, and the final results as ``final/*``.
        exit_code: of the training script; None where the file breaks off before its end.
    """

    file: Path
    name: str = ""
    tags: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def complete(self) -> bool:
        """Whether it trained to its end.

        A run that was killed has no exit record, one that failed another code than 0. One that was
        stopped with a checkpoint exits in order, but before it has final results.
        """
        return self.exit_code == 0 and any(name.startswith("final/") for name in self.summary)


def read_run(file: Path) -> RecordedRun | None:
    """The run in ``file``, as much as there is of it; None where nothing can be read."""
    tool = Path(sys.executable).with_name("wandb")
    command = [str(tool), "leet", "inspect", "--json", str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, errors="replace"
    )
    # It fails on a file that no run has written. One that is cut short is read up to there.
    if done.returncode:
        return None
    run = RecordedRun(file)
    for line in done.stdout.splitlines():
        _take_in(run, json.loads(line))
    return run


def read_runs(folder: Path) -> list[RecordedRun]:
    """All runs in ``folder/wandb`` that can be read, oldest first."""
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    # Each call is a process of its own, that mostly starts Python.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [run for run in pool.map(read_run, files) if run is not None]


def matching(
    runs: Iterable[RecordedRun], config: Mapping[str, Any], tags: Iterable[str]
) -> RecordedRun | None:
    """The newest complete run of this configuration that has these tags, if there is one.

    Versions may differ: they are kept, not compared.
    """
    wanted = set(tags)
    same = [
        run
        for run in runs
        if run.complete
        and wanted <= set(run.tags)
        and {name: run.config.get(name) for name in run.config if name != "versions"} == config
    ]
    return same[-1] if same else None


def _take_in(run: RecordedRun, record: Mapping[str, Any]) -> None:
    match record["type"]:
        case "run":
            run.name = record["run"].get("display_name", "")
            run.tags = tuple(record["run"].get("tags", ()))
            _configure(run, record["run"])
        case "config":
            _configure(run, record)
        case "history":
            run.history.append(record["history"]["item"])
        case "summary":
            run.summary.update(record["summary"].get("update", {}))
        case "exit":
            run.exit_code = record["exit"].get("exit_code", 0)


def _configure(run: RecordedRun, record: Mapping[str, Any]) -> None:
    changes = record.get("config", {}).get("update", {})
    # W&B keeps notes of its own there.
    run.config.update({name: value for name, value in changes.items() if name != "_wandb"})
