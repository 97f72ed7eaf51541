"""Overlap-Local-SGD next to plain DDP: the same model, data and seed, over a slow link.

Trains ResNet-18 on scikit-learn's handwritten digits with both, one after the other, until their
test accuracy is above the target, and shows what it took side by side. The two processes are joined
by a link of 200 Mbit/s where this machine can make one. Takes four to five minutes on two cores.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from common.launch import RECIPES, LaunchError, launch
from common.report import Results, read_results, results_table

CONTENDERS = {
    "overlap-local-sgd": ("--tau", "5", "--alpha", "0.6", "--beta", "0.7"),
    "ddp": (),
}


@dataclass(frozen=True)
class Demo:
    """What can be changed about the demo."""

    workers: int = 2
    """Processes that train together."""
    rate: Annotated[str, tyro.conf.arg(metavar="RATE")] = "200mbit"
    """What each process can send, as recipes/link.py takes it; or unshaped."""
    epochs: int = 12
    """Passes over the data, at most."""
    batch_size: int = 64
    """Samples per step of one process."""
    model: str = "resnet18"
    """resnet18, or small-cnn for a quick look."""
    seed: int = 0
    """Decides the initial weights and the order of the data, the same for both."""
    target: float = 0.95
    """Test accuracy at which training ends, and that both have to get above."""
    output_dir: Path = Path("runs/demo")
    """Every demo makes a folder of its own in this one."""


def train(algorithm: str, demo: Demo, folder: Path) -> Results:
    """Run the vision recipe with ``algorithm``, on display; returns what it wrote."""
    report = folder / f"{algorithm}.json"
    options = {
        "--algorithm": algorithm,
        "--model": demo.model,
        "--epochs": demo.epochs,
        "--batch-size": demo.batch_size,
        "--until-accuracy": demo.target,
        "--seed": demo.seed,
        "--group": f"demo {folder.name}",
        "--output-dir": folder,
        "--json": report,
    }
    arguments = [str(word) for option in options.items() for word in option]
    link = ("--ranks", str(demo.workers), "--rate", demo.rate)
    launch(
        RECIPES / "vision.py",
        [*arguments, *CONTENDERS[algorithm]],
        workers=demo.workers,
        within=[sys.executable, str(RECIPES / "link.py"), *link, "--"],
    )
    return read_results(report)


def show(runs: list[Results], demo: Demo, folder: Path) -> None:
    """Print the runs side by side, and how to look at them in W&B."""
    console = Console(highlight=False)
    console.print()
    console.rule()
    console.print(
        results_table(runs, f"{demo.model} on digits, {demo.workers} workers, seed {demo.seed}")
    )
    console.print("\nThe W&B runs lie in", str(folder / "wandb"), soft_wrap=True)
    console.print("To see their curves together:")
    wandb = Path(sys.executable).with_name("wandb")
    console.print(f"  {_short(wandb)} leet {folder / 'wandb'}", soft_wrap=True)
    console.print("There, Space adds a run to the charts, q leaves and ? lists all keys.")


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main() -> int:
    """Run the demo; the exit status says whether both reached the target."""
    demo = tyro.cli(Demo, description=__doc__)
    folder = demo.output_dir / time.strftime("%Y%m%d-%H%M%S")
    console = Console(highlight=False)
    runs = []
    for number, algorithm in enumerate(CONTENDERS, start=1):
        console.print(f"\n[bold]{number} of {len(CONTENDERS)}: {algorithm}[/bold]")
        try:
            runs.append(train(algorithm, demo, folder))
        except LaunchError as error:
            console.print(str(error), style="bold red", markup=False)
            return 1
        except KeyboardInterrupt:
            console.print("interrupted; all processes have ended")
            return 130
    show(runs, demo, folder)
    below = [run.algorithm for run in runs if (run.accuracy or 0.0) <= demo.target]
    if below:
        console.print(f"[bold red]below {demo.target:.0%}: {', '.join(below)}[/bold red]")
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
