"""Overlap-Local-SGD next to plain DDP: the same model, data and seed, over a slow link.

Trains ResNet-18 on scikit-learn's handwritten digits with both, one after the other, until their
test accuracy is above the target, and says how much sooner one got there, with a picture. The two
processes are joined by a link of 200 Mbit/s where this machine can make one. How long all of it
will take is said after the first steps; on two cores it is three to five minutes.
"""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType

from common.algorithms import AlgorithmName
from common.launch import RECIPES, LaunchError, launch
from common.pace import Pace, read_pace
from common.report import Results, read_results, results_table
from comparison.grid import Cell, Method
from comparison.pictures import draw_curves
from comparison.recorded import read_runs
from comparison.results import AXES, CellResult
from comparison.style import looks

OVERLAP: AlgorithmName = "overlap-local-sgd"
DDP: AlgorithmName = "ddp"
TAU = 5
CONTENDERS = {
    OVERLAP: ("--tau", str(TAU), "--alpha", "0.6", "--beta", "0.7"),
    DDP: (),
}
# Epochs that each takes to the target when nothing is changed about the demo.
_USUAL_EPOCHS = {OVERLAP: 7, DDP: 6}
_POLL_S = 0.2


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

    @property
    def usual(self) -> bool:
        """Whether nothing is changed that decides how many steps there will be."""
        names = ("workers", "batch_size", "model", "seed", "target")
        return all(getattr(self, name) == getattr(Demo, name) for name in names)


def train(algorithm: AlgorithmName, demo: Demo, folder: Path) -> Results:
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
        "--pace": _pace_file(folder, algorithm),
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


def _pace_file(folder: Path, algorithm: AlgorithmName) -> Path:
    return folder / f"{algorithm}-pace.json"


@contextmanager
def estimating(demo: Demo, folder: Path, console: Console) -> Iterator[None]:
    """Say how long the whole demo will take, as soon as the first run has made its first steps."""
    started = time.monotonic()
    over = threading.Event()

    def follow() -> None:
        while not over.wait(_POLL_S):
            pace = read_pace(_pace_file(folder, OVERLAP))
            if pace is not None:
                if console.is_terminal:
                    # The run keeps a bar on this line, and draws it anew on the next.
                    console.control(
                        Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))
                    )
                starting = time.monotonic() - started - pace.seconds
                console.print(estimate(demo, pace, starting), soft_wrap=True)
                return

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join()


def estimate(demo: Demo, pace: Pace, starting: float) -> str:
    """How long both trainings will take together.

    Args:
        demo: what is trained.
        pace: of the first steps of Overlap-Local-SGD, which tell what an all-reduce takes as well.
        starting: seconds that the processes of a run took to start.
    """
    epochs = {name: min(usual, demo.epochs) for name, usual in _USUAL_EPOCHS.items()}
    if not demo.usual:
        epochs = dict.fromkeys(epochs, demo.epochs)
    # A round is hidden under tau steps, as far as they last that long. DDP waits at every step.
    steps = {OVERLAP: max(pace.step, pace.all_reduce / TAU), DDP: pace.step + pace.all_reduce}
    training = sum(epochs[name] * pace.steps_per_epoch * steps[name] for name in CONTENDERS)
    # For every evaluation, all workers' models are averaged.
    evaluating = epochs[OVERLAP] * pace.all_reduce
    total = 2 * starting + training + evaluating
    return (
        f"Judging by the first {pace.steps} steps, the whole demo takes "
        f"{'about' if demo.usual else 'at most'} {_minutes(total)}."
    )


def _minutes(seconds: float) -> str:
    """To ten seconds, which is more than is known."""
    minutes, rest = divmod(10 * max(1, round(seconds / 10)), 60)
    return " ".join([*([f"{minutes} min"] if minutes else []), *([f"{rest} s"] if rest else [])])


def verdict(overlap: Results, ddp: Results, target: float) -> str:
    """What the demo has shown, in one sentence."""
    step, ddp_step = (run.seconds / run.steps for run in (overlap, ddp))
    sent = [_megabytes(run.bytes_sent) for run in (overlap, ddp)]
    return (
        f"Overlap-Local-SGD was above {target:.0%} test accuracy after {overlap.seconds:.1f} s of "
        f"training, {_times(ddp.seconds / overlap.seconds, 'sooner', 'later')} than DDP with its "
        f"{ddp.seconds:.1f} s; each worker sent {sent[0]} instead of {sent[1]}, and a step took "
        f"{step:.2f} s instead of {ddp_step:.2f} s: it was "
        f"{_times(ddp_step / step, 'faster', 'slower')}."
    )


def _times(ratio: float, more: str, less: str) -> str:
    return f"{ratio:.1f} times {more}" if ratio >= 1 else f"{1 / ratio:.1f} times {less}"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.{0 if count >= 10e6 else 1}f} MB"


def draw(folder: Path) -> Path | None:
    """Draw both runs' accuracy against training time; None where W&B's files hold too little."""
    cells = {
        OVERLAP: Cell(Method(OVERLAP, (("beta", "0.7"),)), TAU, "iid"),
        DDP: Cell(Method(DDP), None, "iid"),
    }
    recorded = {run.config.get("algorithm"): run for run in read_runs(folder)}
    results = [CellResult(cells[name], (recorded[name],)) for name in cells if name in recorded]
    if len(results) < len(cells):
        return None
    path = folder / "accuracy-seconds.png"
    style = looks(result.cell.method for result in results)
    draw_curves(results, style, "eval/accuracy", AXES["seconds"], path)
    return path


def show(runs: Sequence[Results], demo: Demo, folder: Path, console: Console) -> None:
    """Print the runs side by side, what they show, and how to look at them in W&B."""
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
    picture = draw(folder)
    if picture is not None:
        console.print("Picture of accuracy against time:", str(picture), soft_wrap=True)


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main() -> int:
    """Run the demo; the exit status says whether both reached the target."""
    demo = tyro.cli(Demo, description=__doc__)
    folder = demo.output_dir / time.strftime("%Y%m%d-%H%M%S")
    console = Console(highlight=False)
    runs = []
    try:
        with estimating(demo, folder, console):
            for number, algorithm in enumerate(CONTENDERS, start=1):
                console.print(f"\n[bold]{number} of {len(CONTENDERS)}: {algorithm}[/bold]")
                runs.append(train(algorithm, demo, folder))
    except LaunchError as error:
        console.print(str(error), style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; all processes have ended")
        return 130
    show(runs, demo, folder, console)
    below = [run.algorithm for run in runs if (run.accuracy or 0.0) <= demo.target]
    if below:
        console.print(f"\n[bold red]below {demo.target:.0%}: {', '.join(below)}[/bold red]")
        return 1
    console.print(f"\n[bold]{verdict(runs[0], runs[1], demo.target)}[/bold]", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
