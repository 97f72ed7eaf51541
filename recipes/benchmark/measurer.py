"""From outside the ranks: starts them on a network, and reads what they have measured."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.launch import RECIPES

__all__ = ["Measurer"]

_STOP_S = 30.0


class Measurer:
    """Runs tasks on ranks joined by a network, and keeps what they found.

    Args:
        folder: where the records go, after those that are there already.
        shaped: whether the network can be shaped here.
    """

    def __init__(self, folder: Path, *, shaped: bool) -> None:
        self._shaped = shaped
        self._records = folder / "records.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def measure(
        self, ranks: int, rate: str, kind: str, fields: Mapping[str, Any], per_node: int = 1
    ) -> list[dict[str, Any]]:
        """The records of one task.

        Raises:
            subprocess.CalledProcessError: a rank failed; it has said why.
        """
        partial = self._records.with_name("partial.jsonl")
        partial.write_text("")
        task = json.dumps({"kind": kind, "fields": fields})
        worker = [sys.executable, "-m", "benchmark.worker", task, str(partial.resolve())]
        link = [sys.executable, str(RECIPES / "link.py"), "--ranks", str(ranks), "--rate", rate]
        link += ["--per-node", str(per_node)]
        search = os.pathsep.join(filter(None, [str(RECIPES), os.environ.get("PYTHONPATH")]))
        command = [*link, "--", *worker]
        _run(command, {**os.environ, "PYTHONPATH": search})
        records = [json.loads(line) for line in partial.read_text().splitlines()]
        partial.unlink()
        with self._records.open("a") as lines:
            for record in records:
                where = {"measurement": kind, "ranks": ranks, "rate": rate, "per_node": per_node}
                lines.write(json.dumps({**where, **record}) + "\n")
        return records

    @property
    def shaped(self) -> bool:
        """Whether rates hold and bytes are counted."""
        return self._shaped


def _run(command: Sequence[str], environment: Mapping[str, str]) -> None:
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate()
    except BaseException:
        # The link cleans up after itself.
        process.terminate()
        process.wait(_STOP_S)
        raise
    if process.returncode:
        sys.stderr.write(errors)
        raise subprocess.CalledProcessError(process.returncode, command)
