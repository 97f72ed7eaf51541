"""The benchmark's results in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from benchmark.results import Cell, Line

__all__ = ["boundary_table", "overhead_table", "race_table", "shared_table"]


def race_table(cell: Cell, lines: Sequence[Line], tau: int) -> Table:
    """All contenders of a cell."""
    table = _table(cell.title if cell.tau else f"{cell.title}, tau={tau}")
    # Where the terminal is too narrow names are wrapped, and never a figure cut.
    table.add_column("")
    for heading in (
        "x no\ncomm.",
        "min",
        "max",
        "ms/step\nabove",
        "s\nexposed",
        "s\nhidden",
        "MB/step\nsent",
        "most in\na step",
        "peak\nmemory",
        "n",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        median, least, most = line.multiple
        table.add_row(
            line.contender,
            f"{median:.3f}",
            f"{least:.3f}",
            f"{most:.3f}",
            f"{line.above * 1e3:.1f}",
            _number(line.exposed),
            _number(line.hidden),
            _number(line.sent_per_step, 1e6),
            _number(line.peak_sent, 1e6),
            f"{line.peak:.1f}",
            str(line.samples),
        )
    between, sender = ("", "rank") if cell.per_node == 1 else (" between machines", "machine")
    table.caption = (
        f"x no comm.: step time in units of no communication{between}, median of n; exposed, "
        f"hidden: of one averaging of the model, as commhooks counts; sent: by each {sender}, "
        "headers included, on average and the most during one step; peak memory: model, gradients "
        "and all, in units of the parameters"
    )
    return table


def overhead_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """A step that neither launches nor lands."""
    table = _table("A step that neither launches nor lands")
    table.add_column("")
    table.add_column("DDP's buckets", justify="right")
    table.add_column("identity hook (µs)", justify="right")
    table.add_column("commhooks, more (µs)", justify="right")
    for record in records:
        table.add_row(
            record["state"],
            str(record["buckets"]),
            f"{record['identity_us']:,.0f}",
            f"{record['difference_us']:+,.0f}",
        )
    return table


def boundary_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """A boundary, and what the state keeps."""
    table = _table("A boundary, waiting left out")
    # Where the terminal is too narrow names are wrapped, and never a figure cut.
    table.add_column("")
    for heading in (
        "M para-\nmeters",
        "ms a\ncopy",
        "boundary\n(copies)",
        "min",
        "max",
        "memory kept\n(models)",
        "kB more after\nround 1",
        "passing\n(models)",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        median, least, most = record["copies"]
        table.add_row(
            record["algorithm"],
            f"{record['parameters'] / 1e6:.1f}",
            f"{record['copy_ms']:.1f}",
            f"{median:.2f}",
            f"{least:.2f}",
            f"{most:.2f}",
            f"{record['extra']:.2f}",
            f"{record['grown'] / 1e3:.0f}",
            f"{record['transient']:.2f}",
        )
    return table


def shared_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """A boundary of islands, beside one where every rank is a worker."""
    first = records[0]
    table = _table(
        f"A boundary where {first['island']} ranks share {first['parameters'] / 1e6:.1f} M "
        "parameters out, waiting left out"
    )
    table.add_column("")
    for heading in (
        "ms, every\nrank alone",
        "ms,\nislands",
        "ms to gather\nthe model",
        "more\n(gatherings)",
        "min",
        "max",
        "kept, alone\n(models)",
        "kept, islands\n(models)",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        table.add_row(
            record["algorithm"],
            *(f"{record[name]:.1f}" for name in ("alone_ms", "shared_ms", "gather_ms")),
            *(f"{gatherings:.2f}" for gatherings in record["above"]),
            f"{record['extra_alone']:.2f}",
            f"{record['extra_shared']:.2f}",
        )
    return table


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def _number(value: float | None, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:.2f}"
