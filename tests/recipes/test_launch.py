"""Launching: what failed is told, and nothing is left running, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from common import launch as launching
from common.launch import RECIPES, LaunchError, launch
from tests.harness import scaled

# Every worker leaves a file named after its process, then does as it is told.
WORKER = """
import os, pathlib, signal, subprocess, sys, time
behaviour, folder = sys.argv[1], pathlib.Path(sys.argv[2])
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / f"{os.getpid()}.pid").touch()
if behaviour == "fails":
    sys.exit("no luck")
if behaviour == "orphans":
    orphan = subprocess.Popen(["sleep", "600"], start_new_session=True)
    (folder / f"{orphan.pid}.pid").touch()
if behaviour in ("sleeps", "stubborn"):
    time.sleep(600)
print("rank", os.environ["RANK"], "threads", os.environ["OMP_NUM_THREADS"], flush=True)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return path


def started(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.pid")]


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_output_is_captured_and_threads_share_the_cores(script: Path, tmp_path: Path) -> None:
    printed = launch(
        script, ["works", str(tmp_path)], workers=2, capture=True, timeout=scaled(60), cwd=tmp_path
    )
    threads = max(1, (os.cpu_count() or 1) // 2)
    for rank in (0, 1):
        assert f"rank {rank} threads {threads}" in printed


def test_a_failure_is_told_with_its_output(script: Path, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"worker.py exited with status 1[\s\S]*no luck"):
        launch(script, ["fails", str(tmp_path)], workers=2, capture=True, timeout=scaled(60))


def test_what_a_worker_left_behind_is_ended(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_GRACE", 0.5)
    launch(script, ["orphans", str(tmp_path)], workers=2, capture=True, timeout=scaled(60))
    assert len(started(tmp_path)) == 4
    assert not any(alive(pid) for pid in started(tmp_path))


def test_time_is_up(script: Path, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="not done after"):
        launch(script, ["sleeps", str(tmp_path)], workers=2, capture=True, timeout=scaled(5))
    assert not any(alive(pid) for pid in started(tmp_path))


@pytest.mark.parametrize(
    ("number", "behaviour"), [(signal.SIGINT, "sleeps"), (signal.SIGTERM, "stubborn")]
)
def test_interrupted_or_terminated(
    number: signal.Signals, behaviour: str, script: Path, tmp_path: Path
) -> None:
    code = (
        "import sys, pathlib; from common import launch\n"
        "launch._GRACE = 2.0\n"
        "launch.launch(pathlib.Path(sys.argv[1]), sys.argv[2:], workers=2)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(script), behaviour, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(RECIPES)},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + scaled(60)
        while len(started(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        parent.send_signal(number)
        parent.wait(timeout=scaled(30))
        assert len(started(tmp_path)) == 2
        assert not any(alive(pid) for pid in started(tmp_path))
        assert parent.returncode != 0
    finally:
        parent.kill()
        parent.wait()
