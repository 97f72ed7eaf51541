"""The share of their time in which workers compute, over links and taus: points of a curve."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmark.contenders import BASELINE, INT4, INT8, TORCHFT_DELAYED
from benchmark.measurer import Measurer
from benchmark.results import Line, lines
from common.markdown import machine, markdown_table
from common.report import read_json, write_json

__all__ = ["CONTENDERS", "Gap", "Point", "Points", "Setting", "gaps", "measure", "table"]

DDP = "DDP"
CONTENDERS = (
    DDP,
    "torch post_localSGD, averager",
    TORCHFT_DELAYED,
    "commhooks OverlapLocalSGD",
    INT8,
    INT4,
)
"""Who is measured, as they are called among all contenders."""
# Rounds and steps that one turn of an overlapped contender times: few steps vary, and many rounds
# over a slow link take minutes.
_MOST_ROUNDS = 4
_ENOUGH_STEPS = 32
# Steps in a row of no communication, beside DDP, which has no tau.
_DDP_STEPS = 8


@dataclass(frozen=True)
class Setting:
    """What is the same for all points of a curve.

    Attributes:
        ranks: workers.
        step_ms: time of a step on the pretend accelerator.
        size: scales its parameters.
        repeats: how often every contender has its turn at a point.
    """

    ranks: int
    step_ms: float
    size: float
    repeats: int


@dataclass(frozen=True)
class Point:
    """One contender on one link; ``tau`` is None for DDP.

    Attributes:
        setting: in which it was measured.
        contender: its name.
        rate: of each worker's link.
        tau: steps between averagings.
        compute_ms: time of a step without communication, beside it.
        step_ms: time of a step.
        utilisation: the one divided by the other, the median of all turns.
        parameters: of the model, in bytes.
    """

    setting: Setting
    contender: str
    rate: str
    tau: int | None
    compute_ms: float
    step_ms: float
    utilisation: float
    parameters: int

    @property
    def place(self) -> tuple[str, str, int | None]:
        """What it is a measurement of."""
        return self.contender, self.rate, self.tau


@dataclass(frozen=True)
class Gap:
    """Contenders that have not been measured yet at one rate and tau."""

    rate: str
    tau: int | None
    contenders: tuple[str, ...]


class Points:
    """All points measured so far, kept in a file.

    Args:
        path: the file.

    Raises:
        ValueError: it holds measurements of another machine.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._all: list[Point] = []
        if not path.exists():
            return
        found = read_json(path)
        if found["machine"] != machine():
            raise ValueError(f"{path} holds measurements of another machine: {found['machine']}")
        for point in found["points"]:
            setting = Setting(**point.pop("setting"))
            self._all.append(Point(setting, **point))

    def add(self, points: Sequence[Point]) -> None:
        """Keep further points, on the disk as well."""
        self._all += points
        content = {"machine": machine(), "points": [asdict(point) for point in self._all]}
        write_json(content, self._path)

    def of(self, setting: Setting) -> list[Point]:
        """Those measured in ``setting``."""
        return [point for point in self._all if point.setting == setting]


def gaps(
    rates: Sequence[str],
    taus: Sequence[int],
    contenders: Sequence[str],
    known: Sequence[Point],
) -> Iterator[Gap]:
    """What is left to measure. DDP comes once for all tau."""
    places = {point.place for point in known}
    for rate in rates:
        for tau in (None, *taus):
            wanted = [name for name in contenders if (name == DDP) == (tau is None)]
            missing = tuple(name for name in wanted if (name, rate, tau) not in places)
            if missing:
                yield Gap(rate, tau, missing)


def measure(gap: Gap, setting: Setting, measurer: Measurer) -> list[Point]:
    """Measure what is missing, beside no communication."""
    tau = gap.tau or _DDP_STEPS
    fields = {
        "load": "pretend",
        "step_seconds": setting.step_ms / 1e3,
        "size": setting.size,
        "tau": tau,
        "repeats": setting.repeats,
        "windows": max(1, min(_MOST_ROUNDS, _ENOUGH_STEPS // tau)),
        # Counting bytes takes tau further steps.
        "counted": False,
        "only": gap.contenders,
        "exactly": True,
    }
    samples = measurer.measure(setting.ranks, gap.rate, "race", fields)
    found = [line for line in lines(samples, tau) if line.contender != BASELINE]
    return [_point(line, gap, setting) for line in found]


def _point(line: Line, gap: Gap, setting: Setting) -> Point:
    return Point(
        setting=setting,
        contender=line.contender,
        rate=gap.rate,
        tau=gap.tau,
        compute_ms=round(1e3 * (line.step_seconds - line.above), 3),
        step_ms=round(1e3 * line.step_seconds, 3),
        utilisation=round(1 / line.multiple[0], 5),
        parameters=line.parameters,
    )


def table(
    points: Sequence[Point], rates: Sequence[str], taus: Sequence[int], head: Mapping[str, str]
) -> str:
    """Utilisation in percent: a row a contender and tau, a column a rate, called by ``head``."""
    found: dict[Any, float] = {point.place: point.utilisation for point in points}
    rows = [
        [
            name,
            "-" if tau is None else str(tau),
            *(
                f"{100 * found[name, rate, tau]:.1f}" if (name, rate, tau) in found else ""
                for rate in rates
            ),
        ]
        for tau in (None, *taus)
        for name in CONTENDERS
        if any((name, rate, tau) in found for rate in rates)
    ]
    return markdown_table(["", "tau", *(head[rate] for rate in rates)], rows)
