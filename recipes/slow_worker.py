"""How long workers wait for one of them that is slow, under every algorithm.

    python recipes/slow_worker.py --docs docs/slow-worker

Four workers train on a pretend accelerator. In the first case the steps of one take twice as long;
in the second it stops now and then; in the third each worker stops, one after the other. Printed
is what the others wait: their time, less what they take without communication. The links are not
shaped, so that nothing is waited for but workers. Takes about seven minutes.
"""

import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from benchmark.contenders import DELAYED, STREAMING
from benchmark.measurer import Measurer
from benchmark.slow_worker import CASES, Case, SlowWorker
from benchmark.waiting import TITLES, Waiting, draw_waiting, waiting_of, waiting_table
from common.entry import enter
from common.markdown import machine
from common.report import write_json
from network import sandbox

_CONTENDERS = (
    "DDP",
    "commhooks LocalSGD",
    "commhooks OverlapLocalSGD",
    "commhooks EASGD",
    "commhooks CoCoDSGD",
    "commhooks DiLoCo",
    DELAYED,
    STREAMING,
)


@dataclass(frozen=True)
class Slow:
    """Who is slow, and how."""

    cases: Annotated[tuple[Case, ...], tyro.conf.arg(metavar="CASE [CASE ...]")] = CASES
    """slower: one worker's steps take twice as long; stopped: it stops now and then; in-turn: each
    worker stops, one after the other."""
    ranks: int = 4
    """Workers."""
    tau: int = 16
    """Steps between two averagings."""
    step_ms: float = 30.0
    """Time of a step on the pretend accelerator."""
    pause_every: int = 10
    """Steps from one pause to the next."""
    pause_steps: float = 3.0
    """Length of a pause, in steps."""
    rate: str = "unshaped"
    """What each worker can send."""
    docs: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder to write the table to as Markdown, the measurements as JSON, and the picture."""
    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """Few and short steps, to see whether it works; the figures mean little."""
    output_dir: Path = Path("runs/slow-worker")
    """Where measurements, table and picture go."""

    @property
    def cycle(self) -> int:
        """Steps in which each worker pauses once."""
        return self.ranks * self.pause_every


def plan_of(slow: Slow, case: Case) -> SlowWorker:
    """What the ranks are told."""
    return SlowWorker(
        case=case,
        step_seconds=slow.step_ms / 1e3,
        size=0.1,
        tau=slow.tau,
        # Each pause uses up a part of what the others may be ahead, which is a round at most.
        warmup=1 if slow.quick else 2 * slow.cycle,
        steps=slow.cycle if slow.quick else 4 * slow.cycle,
        pause_every=slow.pause_every,
        pause_steps=slow.pause_steps,
        only=_CONTENDERS,
    )


def measure_all(slow: Slow, console: Console) -> list[Waiting]:
    """What everybody waits in each case."""
    shaped = sandbox.refusal() is None
    measurer = Measurer(slow.output_dir, shaped=shaped)
    found = []
    for case in slow.cases:
        console.print(f"measuring: {TITLES[case]} ...", style="dim")
        fields = asdict(plan_of(slow, case))
        rate = slow.rate if shaped else "unshaped"
        found += waiting_of(measurer.measure(slow.ranks, rate, "slow", fields))
    return found


def report(slow: Slow, found: list[Waiting], console: Console) -> None:
    """Table and picture."""
    command = shlex.join(["python", "recipes/slow_worker.py", *sys.argv[1:]])
    link = "No link is shaped" if slow.rate == "unshaped" else f"Links of {slow.rate}"
    details = (
        f"Printed by `{command}` on {machine()}. {slow.ranks} workers, tau={slow.tau}, steps of "
        f"{slow.step_ms:g} ms. {link}. A pause every {slow.pause_every} steps, as long as "
        f"{slow.pause_steps:g} of them. Waited: by those that are never slow, or by all where "
        "each stops in turn."
    )
    page = f"{details}\n\n{waiting_table(found)}\n"
    (slow.output_dir / "tables.inc").write_text(page)
    records = [asdict(each) for each in found]
    write_json({"machine": machine(), "waiting": records}, slow.output_dir / "waiting.json")
    draw_waiting(found, slow.output_dir / "waiting.png")
    console.print(page, markup=False, soft_wrap=True)
    if slow.docs is not None:
        slow.docs.mkdir(parents=True, exist_ok=True)
        for name in ("tables.inc", "waiting.json", "waiting.png"):
            shutil.copy(slow.output_dir / name, slow.docs)


def main() -> int:
    """Measure, show, keep."""
    slow = tyro.cli(Slow, description=__doc__)
    if slow.quick:
        slow = replace(slow, tau=4, step_ms=5.0, pause_every=4, pause_steps=1.0)
    console = Console(highlight=False)
    started = time.monotonic()
    try:
        found = measure_all(slow, console)
    except subprocess.CalledProcessError as error:
        console.print(f"[bold red]a measurement failed with status {error.returncode}[/bold red]")
        return 1
    report(slow, found, console)
    minutes = (time.monotonic() - started) / 60
    console.print(f"{minutes:.1f} minutes; measurements and picture lie in {slow.output_dir}")
    return 0


if __name__ == "__main__":
    enter(main)
