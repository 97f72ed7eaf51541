"""One rank on a cuttable network: ``ranks_on_a_link.py RANK RANKS ADDRESS FOLDER TIMEOUT STEPS``.

Trains, tells where it is, and writes what became of it.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import commhooks
from tests.cases import Case
from tests.faults.test_processes import noted_sgd, written
from tests.signals import Signals
from tests.training import Trainer
from tests.workload import trained

TAU = 2
CUT_AT = 2 * TAU


def main(rank: int, ranks: int, address: str, folder: Path, timeout: float, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{address}:29511",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )
    signals = Signals(folder)
    case = Case("OverlapLocalSGD", {"tau": TAU, "beta": 0.5}, optimizers=noted_sgd, steps=steps)
    trainer = Trainer(case)
    error = None
    try:
        for step in range(1, steps + 1):
            if step == CUT_AT:
                signals.give(f"rank {rank} is near")
                signals.await_("cut")
            trainer.step()
        trainer.state.finish()
    except commhooks.RoundError as failure:
        error = str(failure)
    intact = all(map(torch.equal, trained(trainer.model), written[0]))
    report = {"error": error, "intact": intact, "x": trainer.x.tolist()}
    (folder / f"report-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    rank, ranks, address, folder, timeout, steps = sys.argv[1:]
    main(int(rank), int(ranks), address, Path(folder), float(timeout), int(steps))
