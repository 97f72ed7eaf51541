"""Orders what ranks do without timing anything: one gives a signal, another awaits it."""

import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Signals:
    """Named signals between processes that share ``folder``."""

    folder: Path

    def give(self, name: str) -> None:
        (self.folder / name).touch()

    def given(self, name: str) -> bool:
        return (self.folder / name).exists()

    def await_(self, name: str, patience: float = 300.0) -> None:
        deadline = time.monotonic() + patience
        while not self.given(name):
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody gave the signal {name!r}")
            time.sleep(0.005)
