"""One rank of a benchmark: measures what it is told to, and rank 0 writes it down."""

import gc
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmark.contenders import contenders
from benchmark.following import follow
from benchmark.micro import boundaries, overheads, shared_boundaries
from benchmark.race import Race, race
from benchmark.slow_worker import SlowWorker, slow_worker
from benchmark.trace import trace

__all__: list[str] = []


def measurements(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the task asks for, one record after the other."""
    kind, fields = task["kind"], task["fields"]
    if kind == "race":
        yield from race(Race(**{**fields, "only": tuple(fields["only"])}), contenders())
    elif kind == "slow":
        plan = SlowWorker(**{**fields, "only": tuple(fields["only"])})
        yield from slow_worker(plan, contenders())
    elif kind == "following":
        yield from follow(**fields)
    elif kind == "overheads":
        yield from overheads(**fields)
    elif kind == "shared":
        yield from shared_boundaries(**fields)
    elif kind == "trace":
        yield from trace(**fields)
    else:
        yield from boundaries(**fields)


def main(task: str, output: str) -> None:
    """Do what the JSON text ``task`` says, and append the records to ``output``."""
    # torchft tells of every quorum.
    logging.getLogger("torchft").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    # What has been imported stays: the collections between turns need not look at it, every time.
    gc.collect()
    gc.freeze()
    dist.init_process_group("gloo")
    for record in measurements(json.loads(task)):
        if dist.get_rank() == 0:
            with Path(output).open("a") as lines:
                lines.write(json.dumps(record) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
