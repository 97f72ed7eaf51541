"""How long workers wait for one another in training frameworks, as they are and without that.

    python recipes/waiting_frameworks.py --docs docs/waiting-frameworks

Four workers pretend to compute: a step takes 20 ms, and one in ten, drawn by each worker for
itself, 200 ms. With Overlap-Local-SGD nobody would have to wait for such a step. Lightning, Hugging
Face's Trainer and Accelerate communicate besides, and so everybody does. Takes about two minutes.
"""

import json
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

# First: what the frameworks need imports torchvision, which takes some help beside a CPU build.
import common.torchvision_cpu  # noqa: F401

# isort: split
import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, IterableDataset

from commhooks import CommHookState, OverlapLocalSGD
from common.entry import enter
from common.launch import LaunchError, launch
from common.markdown import machine, markdown_table
from common.report import write_json

Framework = Literal["Lightning", "Trainer", "Accelerate"]
SENDS = {
    "Lightning": "one number before every batch: has a SIGTERM come?",
    "Trainer": "tokens, loss and operations at every logged step, with `logging_steps=1`",
    "Accelerate": "every batch of an `IterableDataset`, which rank 0 reads for all",
}
SIZE, BATCH = 256, 8
AS_RANK = "as-rank"


@dataclass(frozen=True)
class Frameworks:
    """What is measured."""

    ranks: int = 4
    """Workers."""
    tau: int = 16
    """Steps between two averagings."""
    steps: int = 150
    """Steps that are timed."""
    step_ms: float = 20.0
    """Time of a step."""
    slow_ms: float = 200.0
    """Time of one step in ten."""
    docs: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder to write the table to as Markdown, and the measurements as JSON."""
    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """Few and short steps, to see whether it works; the figures mean little."""
    output_dir: Path = Path("runs/waiting-frameworks")
    """Where measurements and table go."""


class Pretend(nn.Module):
    """A model whose forward takes its time, and remembers from when to when it was used."""

    def __init__(self, options: Frameworks) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, 1)
        self.options, self.began, self.ended, self.own = options, 0.0, 0.0, 0.0
        self.draw = random.Random(dist.get_rank()).random

    def forward(self, x: Tensor, labels: Tensor, **_: object) -> dict[str, Tensor]:
        self.began = self.began or time.perf_counter()
        ms = self.options.slow_ms if self.draw() < 0.1 else self.options.step_ms
        time.sleep(ms / 1e3)
        self.own += ms / 1e3
        self.ended = time.perf_counter()
        return {"loss": (self.layer(x).squeeze(1) - labels).square().mean()}


class Samples(Dataset[dict[str, Tensor]]):
    """As many as are asked for."""

    def __init__(self, options: Frameworks) -> None:
        self.count = options.steps * options.ranks * BATCH

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.full((SIZE,), index / self.count), "labels": torch.tensor(1.0)}


class Stream(IterableDataset[dict[str, Tensor]]):
    """The same, one after the other."""

    def __init__(self, options: Frameworks) -> None:
        self.samples = Samples(options)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.samples[index] for index in range(len(self.samples)))


def train_lightning(
    options: Frameworks, state: CommHookState, model: Pretend, *, without: bool
) -> None:
    """Lightning, with the callback or with one that registers the state and no more."""
    import lightning as L

    from commhooks.lightning import Consensus

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss: Tensor = self.model(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> SGD:
            return SGD(self.parameters(), lr=1e-3)

    class Register(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            state.register(trainer.strategy.model, *trainer.optimizers)

    trainer = L.Trainer(
        accelerator="cpu",
        devices=options.ranks,
        strategy="ddp",
        callbacks=[Consensus(state) if without else Register()],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(Samples(options), batch_size=BATCH))
    if not without:
        state.finish()


def train_trainer(
    options: Frameworks, state: CommHookState, model: Pretend, *, without: bool
) -> None:
    """Trainer, or the one that takes a state."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from commhooks.transformers import ConsensusTrainer

    class Register(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            state.register(trainer.model_wrapped, trainer.optimizer)

    arguments = TrainingArguments(
        output_dir="trainer",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=options.steps,
        per_device_train_batch_size=BATCH,
        logging_steps=1,
        save_strategy="no",
        ddp_find_unused_parameters=False,
    )
    made = {"model": model, "args": arguments, "train_dataset": Samples(options)}
    if without:
        trainer = ConsensusTrainer(**made, comm_state=state)
    else:
        trainer = Trainer(**made, callbacks=[Register()])
    trainer.train()
    if not without:
        state.finish()


def train_accelerate(
    options: Frameworks, state: CommHookState, model: Pretend, *, without: bool
) -> None:
    """Accelerate's own choice of who reads an IterableDataset, or every rank."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    reading = DataLoaderConfiguration(dispatch_batches=False if without else None)
    accelerator = Accelerator(cpu=True, dataloader_config=reading)
    loader = DataLoader(Stream(options), batch_size=BATCH)
    ddp, optimizer, loader = accelerator.prepare(model, SGD(model.parameters(), lr=1e-3), loader)
    state.register(ddp, optimizer)
    for batch in loader:
        accelerator.backward(ddp(**batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    state.finish()


TRAIN: dict[Framework, Callable[..., None]] = {
    "Lightning": train_lightning,
    "Trainer": train_trainer,
    "Accelerate": train_accelerate,
}


def be_a_rank(options: Frameworks, framework: Framework, file: Path) -> None:
    """Train as it is and without; the first rank writes what all have measured."""
    dist.init_process_group("gloo")
    found = []
    for without in (False, True):
        model, state = Pretend(options), OverlapLocalSGD(tau=options.tau)
        TRAIN[framework](options, state, model, without=without)
        ranks: list[tuple[float, float]] = [(0.0, 0.0)] * options.ranks
        dist.all_gather_object(ranks, (model.ended - model.began, model.own))
        taken, own = (max(each) for each in zip(*ranks, strict=True))
        found.append({"seconds": taken, "own": own, "sent": state.stats.foreign_collectives})
    if dist.get_rank() == 0:
        file.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measured(options: Frameworks, framework: Framework) -> list[dict[str, float]]:
    """What one framework's runs took, as it is and without."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        plan = asdict(replace(options, docs=None, output_dir=None))  # type: ignore[arg-type]
        launch(
            Path(__file__),
            [AS_RANK, json.dumps(plan), framework, str(file)],
            workers=options.ranks,
            capture=True,
            environment={"ACCELERATE_USE_CPU": "true"},
            cwd=Path(folder),
        )
        found: list[dict[str, float]] = json.loads(file.read_text())
        return found


def report(options: Frameworks, console: Console) -> None:
    """Measure everything; table and records."""
    rows, records = [], []
    for framework in get_args(Framework):
        pair = measured(options, framework)
        records.append({"framework": framework, "as it is": pair[0], "without": pair[1]})
        counts = [f"{each['sent'] / options.steps:.2g}" for each in pair]
        times = [f"{each['seconds']:.1f} s" for each in pair]
        rows.append(
            [f"{framework}: {SENDS[framework]}", *counts, *times, f"{pair[0]['own']:.1f} s"]
        )
        console.print(f"{framework}: {times[0]} as it is, {times[1]} without", style="dim")
    head = ["framework, and what it sends", "a step", "then", "as it is", "without", "own work"]
    command = shlex.join(["python", "recipes/waiting_frameworks.py", *sys.argv[1:]])
    page = (
        f"Printed by `{command}` on {machine()}. {options.ranks} workers on one machine, "
        f"Overlap-Local-SGD with tau={options.tau}, {options.steps} steps of {options.step_ms:g} "
        f"ms, of which one in ten takes {options.slow_ms:g} ms. A step: collectives that "
        "`stats.foreign_collectives` has counted, as it is, and then without. Own work: of the "
        "worker that has most of it.\n\n"
        f"{markdown_table(head, rows)}\n"
    )
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "tables.inc").write_text(page)
    found = {"machine": machine(), "frameworks": records}
    write_json(found, options.output_dir / "frameworks.json")
    console.print(page, markup=False, soft_wrap=True)
    if options.docs is not None:
        options.docs.mkdir(parents=True, exist_ok=True)
        for name in ("tables.inc", "frameworks.json"):
            shutil.copy(options.output_dir / name, options.docs)


def main() -> int:
    """Measure, show, keep; or be one of the ranks that do."""
    if sys.argv[1:2] == [AS_RANK]:
        plan, framework, file = sys.argv[2:]
        be_a_rank(Frameworks(**json.loads(plan)), cast(Framework, framework), Path(file))
        return 0
    options = tyro.cli(Frameworks, description=__doc__)
    if options.quick:
        options = replace(options, ranks=2, tau=4, steps=24, step_ms=2.0, slow_ms=5.0)
    console = Console(highlight=False)
    try:
        report(options, console)
    except LaunchError as error:
        console.print(f"[bold red]{error}[/bold red]")
        return 1
    return 0


if __name__ == "__main__":
    enter(main)
