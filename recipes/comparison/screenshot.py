"""A picture of `wandb leet` with the runs of a folder on its charts, for the documentation.

    python recipes/comparison/screenshot.py runs/compare/short/wandb docs/comparing/leet.svg

Needs tmux, which gives the program a terminal and copies what is on it.
"""

import re
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from uuid import uuid4

from rich.console import Console
from rich.text import Text

_COLUMNS, _ROWS = 150, 42
# Until it has read the runs, and between two keys.
_START_S, _KEY_S = 8.0, 1.0
# The mouse drags the border of the list to the right: the names of the runs come behind date and
# time. Then only runs of one seed, all of them on the charts, and the charts that tell most.
_DRAG = ("\x1b[<0;39;20M", "\x1b[<32;62;20M", "\x1b[<0;62;20m")
_KEYS = (*_DRAG, "f", "s0-", "Enter", "C-a", "y", "/", "by_time|seconds_", "Enter")


def capture(folder: Path) -> str:
    """What `wandb leet` shows, in ANSI, after these keys."""
    socket = f"screenshot-{uuid4().hex[:8]}"
    leet = [str(Path(sys.executable).with_name("wandb")), "leet", str(folder)]
    _tmux(socket, "new-session", "-d", "-x", str(_COLUMNS), "-y", str(_ROWS), *leet)
    try:
        time.sleep(_START_S)
        for key in _KEYS:
            literally = ["-l"] if key in _DRAG else []
            _tmux(socket, "send-keys", *literally, "--", key)
            time.sleep(_KEY_S)
        time.sleep(_START_S / 2)
        lines = _tmux(socket, "capture-pane", "-p", "-e").rstrip().splitlines()
        # The last line names the folder with all that is above it.
        return "\n".join(lines[:-1])
    finally:
        _tmux(socket, "kill-server")


def draw(screen: str, path: Path, title: str) -> None:
    """Write the screen as SVG, which is sharp at every size."""
    console = Console(record=True, width=_COLUMNS, file=StringIO())
    console.print(Text.from_ansi(screen), soft_wrap=True)
    picture = console.export_svg(title=title)
    # Without the fonts that rich would have a browser fetch from a server.
    picture = re.sub(r"@font-face \{.*?\}\n", "", picture, flags=re.DOTALL)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(picture)


def _tmux(socket: str, *words: str) -> str:
    command = ["tmux", "-L", socket, "-f", "/dev/null", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Take the picture that the command line asks for."""
    folder, path = map(Path, sys.argv[1:])
    draw(capture(folder), path, "wandb leet " + "/".join(folder.parts[-4:]))


if __name__ == "__main__":
    main()
