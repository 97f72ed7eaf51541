"""What the library is to reach, and what the benchmark has measured of it, one figure each."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from benchmark.contenders import (
    ALONE,
    DELAYED,
    INT4,
    INT8,
    ISLANDS,
    STREAMING,
    TORCHFT_DELAYED,
)
from benchmark.results import Cell, Line

__all__ = ["Bar", "bars_table", "measured_bars"]

# A round has room for this much unevenness before a boundary waits for it.
_SLACK = 1.2
# In units of the parameters, the shared bucket left out.
_VECTORS = {
    "LocalSGD": 1,
    "OverlapLocalSGD": 1,
    "OverlapLocalSGD, beta=0.7": 3,
    # The wire, e and r, E of one of two ranks, and three and a half encoded vectors.
    "OverlapLocalSGD, int8": 3.5 + 3.5 * 260 / 1024,
    "OverlapLocalSGD, int4": 3.5 + 3.5 * 132 / 1024,
    "EASGD": 1,
    "CoCoDSGD": 2,
    "BMUF": 3,
    "SlowMo": 3,
    # z, the wire, the outer optimizer's momentum; and where this rank was at the launch.
    "DiLoCo": 3,
    "DiLoCo, carry": 4,
    "DiLoCo, 4 fragments": 3,
    "DiLoCo, 4 fragments, plain SGD": 2,
}
_BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True)
class Bar:
    """One line: what is measured, the bar, the worst that was measured."""

    what: str
    bar: str
    measured: str


def measured_bars(
    results: Mapping[Cell, Sequence[Line]],
    micro: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[Bar]:
    """Those for which something was measured, on the pretend accelerator."""
    cells = {cell: {line.contender: line for line in found} for cell, found in results.items()}
    cells = {cell: found for cell, found in cells.items() if cell.load == "pretend"}
    machines = {cell: found for cell, found in cells.items() if cell.per_node > 1}
    ranks = {cell: found for cell, found in cells.items() if cell.per_node == 1}
    return [
        *_of_races(ranks),
        *_of_diloco(ranks),
        *_of_compression(ranks),
        *_of_islands(machines),
        *_of_micro(micro),
        *_of_shared(micro.get("shared", ())),
    ]


def _of_races(cells: Mapping[Cell, Mapping[str, Line]]) -> Iterator[Bar]:
    hidden, paced, faster, sent = [], [], [], []
    for cell, found in cells.items():
        ours = [
            line
            for name, line in found.items()
            if name.startswith("commhooks") and name not in (INT8, INT4)
        ]
        overlapped = [line.multiple[0] for line in ours if line.kind == "overlapped"]
        if not overlapped or ALONE not in found:
            continue
        alone = found[ALONE].multiple[0]
        if _SLACK * alone <= 1:
            hidden += overlapped
        elif alone > 1:
            paced += [multiple / alone for multiple in overlapped]
        if "DDP" in found and (cell.ranks, cell.rate) == (2, "200mbit"):
            faster += [found["DDP"].multiple[0] / multiple for multiple in overlapped]
        sent += _sent([line for line in ours if line.kind != "step"], cell, cell.ranks)
    yield from _bar(
        "overlapped, where tau steps take 1.2 x the all-reduce or more: x no communication",
        "at most 1.01",
        hidden,
        3,
    )
    yield from _bar(
        "overlapped, 2 ranks at 200mbit: times faster than DDP", "at least 5.8", faster, 2
    )
    yield from _bar(
        "overlapped, where the all-reduce takes longer than tau steps: x the all-reduce alone",
        "at most 1.03",
        paced,
        3,
    )
    yield from _bar(
        "bytes on a shaped wire a round, headers included: x 2 (m - 1) / m x the parameters",
        "at most 1.06",
        sent,
        3,
    )


def _of_diloco(cells: Mapping[Cell, Mapping[str, Line]]) -> Iterator[Bar]:
    ours, theirs, peaks = [], [], []
    for cell, found in cells.items():
        if (cell.ranks, cell.rate) == (2, "200mbit"):
            ours += [found[name].multiple[0] for name in (DELAYED, STREAMING) if name in found]
            theirs += [found[TORCHFT_DELAYED].multiple[0]] if TORCHFT_DELAYED in found else []
        one, four = (found[n].peak_sent if n in found else None for n in (DELAYED, STREAMING))
        # A shaped link spreads what one step launches over several.
        if cell.rate == "unshaped" and one and four:
            peaks.append(four / one)
    yield from _bar(
        "DiLoCo with delay=tau and with 4 fragments, 2 ranks at 200mbit: x no communication",
        "at most 1.01",
        ours,
        3,
    )
    yield from _bar("torchft's delayed DiLoCo beside them", "none", theirs, 3)
    yield from _bar(
        "DiLoCo with 4 fragments, unshaped: the most sent during one step, x one fragment's",
        "at most 0.3",
        peaks,
        2,
    )


def _of_compression(cells: Mapping[Cell, Mapping[str, Line]]) -> Iterator[Bar]:
    for name, ranks, rate, bar in (
        (INT8, 2, "50mbit", 1.02),
        (INT4, 4, "50mbit", 1.02),
        (INT4, 2, "12.5mbit", 1.03),
    ):
        for cell, found in cells.items():
            if (cell.ranks, cell.rate) == (ranks, rate) and name in found:
                beside = found["DDP, PowerSGD"].multiple[0] if "DDP, PowerSGD" in found else None
                tau = f", tau={cell.tau}" if cell.tau else ""
                what = f"{_kind(name)}, {ranks} ranks at {rate}{tau}: x no communication"
                if beside is not None:
                    what += f" (PowerSGD: {beside:.2f})"
                yield from _bar(what, f"at most {bar}", [found[name].multiple[0]], 3)
    for name, bar in ((INT8, 0.27), (INT4, 0.14)):
        sent = [
            share
            for cell, found in cells.items()
            if name in found
            for share in _sent([found[name]], cell, cell.ranks)
        ]
        what = f"{_kind(name)}: bytes on a shaped wire a round, headers included: x fp32's without"
        yield from _bar(what, f"at most {bar}", sent, 3)


def _kind(name: str) -> str:
    return name.rpartition(" ")[2]


def _of_islands(cells: Mapping[Cell, Mapping[str, Line]]) -> Iterator[Bar]:
    sent = []
    for cell, found in cells.items():
        ours = [line for name, line in found.items() if name.startswith(ISLANDS)]
        tau = f", tau={cell.tau}" if cell.tau else ""
        yield from _bar(
            f"overlapped with islands at {cell.rate}{tau}: x no communication between machines",
            "at most 1.02",
            [line.multiple[0] for line in ours if line.kind == "overlapped"],
            3,
        )
        # The ranks of a machine together, each of which sends its share of the model.
        full = [line for line in ours if "int" not in line.contender]
        sent += _sent(full, cell, cell.ranks // cell.per_node)
    yield from _bar(
        "bytes over a machine's link a round: x 2 (m - 1) / m x the parameters",
        "at most 1.06",
        sent,
        3,
    )


def _of_micro(micro: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Bar]:
    overheads = micro.get("overheads", ())
    for what, bar, times in (
        (
            "a step that neither launches nor lands, 1 to 64 buckets: µs above an identity hook",
            "at most 150",
            [r["difference_us"] for r in overheads if "fragments" not in r["state"]],
        ),
        (
            "the same, 1 bucket and 1 to 64 fragments",
            "at most 40",
            [r["difference_us"] for r in overheads if "fragments" in r["state"]],
        ),
    ):
        yield from _bar(what, bar, times, 0)
    boundaries = micro.get("boundaries", ())
    for what, bar, compressed in (
        ("a boundary, all-reduce done: x a copy of the parameters", "at most 4", False),
        ("the same with int8 and int4", "at most 8", True),
    ):
        copies = [r["copies"][0] for r in boundaries if ("int" in r["algorithm"]) == compressed]
        yield from _bar(what, bar, copies, 2)
    above = [
        (record["extra"] - _VECTORS[record["algorithm"]]) * 4 * record["parameters"] / _BUCKET_BYTES
        for record in boundaries
    ]
    yield from _bar(
        "memory kept above what the algorithm says (1 to 4 models): buckets of 25 MiB",
        "at most 1",
        above,
        2,
    )


def _of_shared(records: Sequence[Mapping[str, Any]]) -> Iterator[Bar]:
    yield from _bar(
        "a boundary of islands, above that of ranks alone: x gathering the model in the island",
        "at most 1",
        [record["above"][0] for record in records],
        2,
    )
    above = [
        (r["extra_shared"] - r["extra_alone"] / r["island"] - 1) * 4 * r["parameters"]
        for r in records
    ]
    yield from _bar(
        "memory of islands above 1/L of what ranks alone keep and one model: buckets of 25 MiB",
        "at most 1",
        [most / _BUCKET_BYTES for most in above],
        2,
    )


def _sent(lines: Sequence[Line], cell: Cell, m: int) -> list[float]:
    """What each put on a shaped link for one averaging, x that of a ring over ``m`` workers."""
    if cell.rate == "unshaped":
        return []
    ideal = 2 * (m - 1) / m
    return [line.sent / (ideal * line.parameters) for line in lines if line.sent is not None]


def _bar(what: str, bar: str, values: Sequence[float], digits: int) -> Iterator[Bar]:
    """One line, if there is anything to say in it."""
    if values:
        least, most = (f"{value:.{digits}f}" for value in (min(values), max(values)))
        yield Bar(what, bar, least if least == most else f"{least} to {most}")


def bars_table(bars: Sequence[Bar]) -> Table:
    """For the terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("commhooks, pretend accelerator")
    table.add_column("bar", no_wrap=True)
    table.add_column("measured", no_wrap=True, justify="right")
    for bar in bars:
        table.add_row(bar.what, bar.bar, bar.measured)
    return table
