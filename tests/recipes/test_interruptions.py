"""Runs of the recipe that are killed or asked to stop, and end on the very same weights."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from commhooks.checkpoints import verify
from common.launch import RECIPES, launch_command
from tests.harness import scaled
from tests.harness.script import run_script

STEPS = 220
EVERY = 11
ARGUMENTS = (
    *("--model", "small-cnn", "--epochs", "10", "--tau", "4"),
    *("--checkpoint-every", str(EVERY)),
)
PATIENCE = 100.0

# A test launches the recipe up to three times, which on a busy machine takes most of a minute each.
pytestmark = pytest.mark.timeout(400)


class Running:
    """A launch of the recipe, in a session of its own."""

    def __init__(self, folder: Path, *arguments: str, restarts: int = 0) -> None:
        self.folder = folder
        self.printed = folder / "printed"
        command = launch_command(
            RECIPES / "vision.py",
            [*ARGUMENTS, "--output-dir", str(folder), "--resume", "latest", *arguments],
            workers=2,
        )
        script = command.index(str(RECIPES / "vision.py"))
        command[script:script] = ["--max_restarts", str(restarts), "--monitor_interval", "0.2"]
        with self.printed.open("a") as output:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.seen: set[psutil.Process] = set()

    def workers(self) -> list[psutil.Process]:
        """The processes that train, by age."""
        try:
            children = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []
        found = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
        self.seen.update(found)
        return sorted(found, key=lambda child: child.pid)

    def saved(self) -> set[int]:
        """The numbers of the checkpoints there are."""
        return {int(path.name[-8:]) for path in self.folder.glob("checkpoints/checkpoint-*")}

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for ``condition``, or the end of the launch."""
        deadline = time.monotonic() + scaled(PATIENCE)
        while not condition() and self.process.poll() is None:
            self.workers()
            assert time.monotonic() < deadline, self.printed.read_text()
            time.sleep(0.02)

    def sleep(self, seconds: float) -> None:
        """Wait for ``seconds``, or the end of the launch."""
        wake = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > wake)

    def end(self) -> int:
        """The launcher's status, once no worker is left."""
        status = self.process.wait(scaled(5 * PATIENCE))
        psutil.wait_procs(self.seen, timeout=scaled(PATIENCE))
        assert not [each for each in self.seen if each.is_running()]
        return status


@contextmanager
def running(folder: Path, *arguments: str, restarts: int = 0) -> Iterator[Running]:
    """Nothing of it is left after the block."""
    folder.mkdir(exist_ok=True)
    run = Running(folder, *arguments, restarts=restarts)
    try:
        yield run
    finally:
        run.workers()
        for process in (psutil.Process(), *run.seen):
            if process.pid != os.getpid() and process.is_running():
                process.kill()
        run.process.kill()
        run.process.wait()


def forked(folder: Path, *arguments: str) -> str:
    """What a run that nobody disturbs printed; without the launcher, which takes long to start."""
    options = [*ARGUMENTS, "--output-dir", str(folder), "--resume", "latest", *arguments]
    return run_script(RECIPES / "vision.py", options, 2, folder=folder, timeout=PATIENCE)


def weights(folder: Path, steps: int = STEPS) -> str:
    """The SHA-256 sum of the final model."""
    checkpoint = folder / "checkpoints" / f"checkpoint-{steps:08d}"
    assert verify(checkpoint) is None
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    return str(manifest["files"]["model.safetensors"]["sha256"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("whole")
    forked(folder, "--wandb", "disabled")
    return weights(folder)


def kill_and_compare(folder: Path, kills: int, seed: int, steps: int, expected: str) -> None:
    """SIGKILL for one random worker at ``kills`` random moments; the launcher starts them anew."""
    chance = random.Random(seed)
    arguments = ("--wandb", "disabled", "--epochs", str(steps // 22))
    startup = 0.0
    with running(folder, *arguments, restarts=kills) as run:
        for done in range(kills):
            started, before = time.monotonic(), max(run.saved(), default=0)
            run.until(lambda: len(run.workers()) == 2)
            if startup and chance.random() < 0.3:
                run.sleep(chance.uniform(0, startup))  # before the first step, most likely
            else:
                # Counted in checkpoints, since a fast machine would be through before a set time.
                goal = before + EVERY * chance.randint(1, 5)
                run.until(lambda: max(run.saved(), default=0) >= goal)  # noqa: B023 - awaited here
                startup = startup or time.monotonic() - started
                run.sleep(chance.uniform(0, 0.1))
            victims = run.workers()
            assert run.process.poll() is None, f"the run was over after {done} kills"
            victim = chance.choice(victims)
            victim.kill()
            run.until(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE)  # noqa: B023
            run.until(lambda: not set(victims) & set(run.workers()))  # noqa: B023
        status = run.end()
        assert status == 0, run.printed.read_text()
    assert weights(folder, steps) == expected
    assert "going on after step" in run.printed.read_text()


@pytest.mark.slow
def test_a_killed_worker_costs_no_bit(uninterrupted: str, tmp_path: Path) -> None:
    kill_and_compare(tmp_path, 1, 0, STEPS, uninterrupted)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_kills_cost_no_bit(tmp_path: Path) -> None:
    """Ten workers killed at random moments of a run of 1,100 steps."""
    steps = 1100
    with running(tmp_path / "whole", "--wandb", "disabled", "--epochs", "50") as run:
        assert run.end() == 0, run.printed.read_text()
    kill_and_compare(tmp_path / "killed", 10, 1, steps, weights(tmp_path / "whole", steps))


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.soak)]
)
def test_asked_to_stop_it_saves_and_leaves(
    number: signal.Signals, uninterrupted: str, tmp_path: Path
) -> None:
    """One worker is told, as by a scheduler; all stop after the same step, with status 0."""
    with running(tmp_path, "--wandb", "offline", "--checkpoint-every", "1") as run:
        run.until(run.saved)
        run.workers()[-1].send_signal(number)
        assert run.end() == 0, run.printed.read_text()
        stopped_at = max(run.saved())
    assert f"stopped after step {stopped_at}" in run.printed.read_text()
    assert stopped_at < STEPS
    printed = forked(tmp_path, "--wandb", "offline", "--checkpoint-every", "1000")
    assert f"going on after step {stopped_at}" in printed
    assert weights(tmp_path) == uninterrupted
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert len({name.split("-", 3)[-1] for name in runs}) == 1, "another W&B run"


def ctrl_c(
    folder: Path, seconds: float | None, *options: str, within: Sequence[str] = ()
) -> tuple[int, str]:
    """The status of a launch that gets Ctrl-C, as a terminal sends it, and what it printed.

    After so many seconds; or with None, once a checkpoint has been saved.
    """
    command = [sys.executable, str(RECIPES / "start.py"), str(RECIPES / "vision.py")]
    arguments = ["--model", "small-cnn", "--epochs", "500", "--wandb", "disabled", *options]
    printed = folder / "printed"
    with printed.open("w") as output:
        process = subprocess.Popen(
            [*within, *command, *arguments, "--output-dir", str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + scaled(PATIENCE)
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1 if seconds is None else seconds)
                if seconds is not None or list(folder.glob("checkpoints/checkpoint-*")):
                    break
            os.killpg(process.pid, signal.SIGINT)
            return process.wait(scaled(PATIENCE)), printed.read_text()
        finally:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_ctrl_c_saves_and_ends_quietly(tmp_path: Path) -> None:
    status, printed = ctrl_c(tmp_path, None, "--checkpoint-every", "20")
    assert status == 130, printed
    assert "Traceback" not in printed
    assert "commhooks: OverlapLocalSGD" not in printed
    assert "stopped after step" in printed.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 4.0, 8.0, 20.0])
def test_ctrl_c_ends_quietly_at_any_time(tmp_path: Path, seconds: float) -> None:
    """While the launcher imports, while the workers do, and while they train."""
    status, printed = ctrl_c(tmp_path, seconds)
    assert status == 130, printed
    assert "Traceback" not in printed
    assert "commhooks: OverlapLocalSGD" not in printed


@pytest.mark.slow
def test_ctrl_c_through_a_link(tmp_path: Path) -> None:
    link = [sys.executable, str(RECIPES / "link.py"), "--"]
    status, printed = ctrl_c(tmp_path, None, "--checkpoint-every", "20", within=link)
    assert status == 130, printed
    assert "Traceback" not in printed
    assert "stopped after step" in printed


@pytest.mark.soak
def test_the_launcher_passes_a_request_on(tmp_path: Path) -> None:
    """SIGTERM for the launcher, as `timeout` or a user's kill sends it: saved, and no orphan."""
    with running(tmp_path, "--wandb", "disabled", "--checkpoint-every", "1") as run:
        run.until(run.saved)
        run.process.send_signal(signal.SIGTERM)
        run.end()
        stopped_at = max(run.saved())
    assert f"stopped after step {stopped_at}" in run.printed.read_text()


@pytest.mark.soak
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--resume", "none"), "holds checkpoints of an earlier run"),
        (("--lr", "0.01"), "is of another run: lr was 0.05 and is 0.01"),
        (("--resume", "nowhere"), "--resume nowhere: manifest.json cannot be read"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused(
    kept: Path, arguments: tuple[str, ...], words: str
) -> None:
    with running(kept, "--wandb", "disabled", *arguments) as run:
        assert run.end() != 0
    assert words in run.printed.read_text()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps, over before its second checkpoint."""
    folder = tmp_path_factory.mktemp("kept")
    with running(folder, "--wandb", "disabled", "--max-steps", "12") as run:
        assert run.end() == 0, run.printed.read_text()
    return folder


@pytest.mark.soak
def test_a_damaged_newest_checkpoint_is_reported(kept: Path) -> None:
    checkpoints = kept / "checkpoints"
    os.truncate(checkpoints / "checkpoint-00000012" / "model.safetensors", 100)
    with running(kept, "--wandb", "disabled", "--max-steps", "12") as run:
        assert run.end() == 0, run.printed.read_text()
    printed = run.printed.read_text()
    assert "checkpoint-00000012 is not used: rank 0: model.safetensors has 100 bytes" in printed
    assert "going on after step 11" in printed
    assert verify(checkpoints / "checkpoint-00000012") is None
