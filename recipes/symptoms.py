"""What goes wrong in a run, made on purpose, and what the state's figures say of it.

    python recipes/symptoms.py

Trains a small network on the digits with Overlap-Local-SGD over four processes of this machine,
once as it should be and then with one thing wrong at a time. Prints a line for each: accuracy of
the consensus model and of each worker's own, relative drift and agreement, and how far each worker
is from the anchor.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import commhooks
from common.data import load_images
from common.markdown import machine, markdown_table
from common.partitions import Scheme, partition

WORKERS, BATCH, STEPS = 4, 32, 480
LR = 0.1
"""Right for DDP here (docs/choosing.md)."""


@dataclass(frozen=True)
class Symptom:
    """One run.

    Attributes:
        name: what is wrong.
        tau: steps between rounds.
        lr: a multiple of what is right for DDP; None for ``state.lr_factor``.
        scheme: how the digits are dealt out.
        norm: whether the network has BatchNorm.
        broken: how the last worker is; ``"labels"``, its labels are random; ``"rate"``, its
            learning rate is four times the others'.
    """

    name: str
    tau: int = 8
    lr: float | None = None
    scheme: Scheme = "iid"
    norm: bool = False
    broken: str = ""


HEALTHY = Symptom("as it should be")
SYMPTOMS = (
    HEALTHY,
    replace(HEALTHY, name="DDP's learning rate", lr=1.0),
    replace(HEALTHY, name="a learning rate four times too high", lr=10.0),
    replace(HEALTHY, name="tau too long", tau=60),
    replace(HEALTHY, name="data of the workers different", scheme="major-class"),
    replace(HEALTHY, name="with BatchNorm", norm=True),
    replace(HEALTHY, name="with BatchNorm, data different", norm=True, scheme="major-class"),
    replace(HEALTHY, name="one worker's labels are random", broken="labels"),
    replace(HEALTHY, name="one worker's learning rate is four times too high", broken="rate"),
)


@dataclass(frozen=True)
class Found:
    """What one run ended with, means over the second half of it where there are several rounds.

    Attributes:
        accuracy: of the consensus model on the test set.
        own_accuracy: of each worker's own model, evaluated outside ``averaged()``.
        relative_drift, agreement: as in ``state.stats``.
        distances: every worker's ``consensus_distance``.
        worst: the parameters with the largest drift at the end.
    """

    accuracy: float
    own_accuracy: list[float]
    relative_drift: float
    agreement: float
    distances: list[float]
    worst: list[str]


def network(symptom: Symptom) -> nn.Module:
    """A small convolutional network, with or without BatchNorm."""
    torch.manual_seed(0)
    norm = [nn.BatchNorm2d(16)] if symptom.norm else []
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1, bias=not norm),
        *norm,
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def run(symptom: Symptom, steps: int) -> Found:
    """Train over all ranks."""
    rank = dist.get_rank()
    images = load_images("digits")
    share = partition(images.labels, WORKERS, symptom.scheme, seed=0)[rank]
    state = commhooks.OverlapLocalSGD(tau=symptom.tau)
    lr = LR * (state.lr_factor if symptom.lr is None else symptom.lr)
    if symptom.broken == "rate" and rank == WORKERS - 1:
        lr *= 4
    model = DistributedDataParallel(network(symptom))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    state.register(model, optimizer)
    draw = torch.Generator().manual_seed(rank)
    rounds: list[commhooks.Stats] = []
    for step in range(1, steps + 1):
        picked = share[torch.randint(len(share), (BATCH,), generator=draw).numpy()]
        x, y = _stacked([images.train[int(index)] for index in picked])
        if symptom.broken == "labels" and rank == WORKERS - 1:
            y = torch.randint(10, y.shape, generator=draw)
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if step > steps // 2 and step % symptom.tau == 0:
            rounds.append(state.stats)
    test = _stacked([images.test[index] for index in range(360)])
    own = [0.0] * WORKERS
    distance = sum(stats.consensus_distance for stats in rounds) / len(rounds)
    dist.all_gather_object(own, [_accuracy(model.module, test), distance])
    worst = [row.name for row in state.drift()][:2]
    state.finish()
    return Found(
        accuracy=_accuracy(model.module, test),
        own_accuracy=[each[0] for each in own],  # type: ignore[index]
        relative_drift=sum(stats.relative_drift for stats in rounds) / len(rounds),
        agreement=sum(stats.agreement for stats in rounds) / len(rounds),
        distances=[each[1] for each in own],  # type: ignore[index]
        worst=worst,
    )


def _stacked(samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])


def _accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    x, y = test
    model.eval()
    with torch.no_grad():
        right = (model(x).argmax(dim=1) == y).double().mean().item()
    model.train()
    return float(right)


def _work(rank: int, folder: str, symptoms: Sequence[Symptom], steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORKERS
    )
    found = [asdict(run(symptom, steps)) for symptom in symptoms]
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def run_all(symptoms: Sequence[Symptom], steps: int = STEPS) -> list[Found]:
    """Run all of them in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, (folder, symptoms, steps), nprocs=WORKERS)  # type: ignore[no-untyped-call]
        return [Found(**each) for each in json.loads(Path(folder, "found.json").read_text())]


def table_of(symptoms: Sequence[Symptom], found: Sequence[Found]) -> str:
    """A line for each."""
    head = ["", "accuracy (%)", "workers' own", "relative drift", "agreement", "distances"]
    rows = [
        [
            symptom.name,
            f"{100 * each.accuracy:.1f}",
            " ".join(f"{100 * own:.0f}" for own in each.own_accuracy),
            f"{each.relative_drift:.3f}",
            f"{each.agreement:.2f}",
            " ".join(f"{distance:.2g}" for distance in each.distances),
        ]
        for symptom, each in zip(symptoms, found, strict=True)
    ]
    return markdown_table(head, rows)


def main() -> None:
    """Run all of them, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--docs", type=Path, help="folder to write the table to, as Markdown")
    options = parser.parse_args()
    table = table_of(SYMPTOMS, run_all(SYMPTOMS))
    print(table)
    if options.docs is not None:
        options.docs.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["python", "recipes/symptoms.py", *sys.argv[1:]])
        text = f"Printed by `{command}` on {machine()}.\n\n{table}\n"
        (options.docs / "symptoms.inc").write_text(text)


if __name__ == "__main__":
    main()
