"""The benchmark's results as a page of the documentation, together with where they come from."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmark.bars import Bar
from benchmark.results import Cell, Line
from common.markdown import machine, markdown_table

__all__ = ["markdown"]


def markdown(
    results: Mapping[Cell, Sequence[Line]],
    micro: Mapping[str, Sequence[Mapping[str, Any]]],
    bars: Sequence[Bar],
    *,
    command: str,
    tau: int,
) -> str:
    """Command, machine and tables."""
    parts = [f"Printed by `{command}` on {machine()}, tau={tau}."]
    if bars:
        head = ("", "bar", "measured")
        parts += ["### In short", markdown_table(head, [(b.what, b.bar, b.measured) for b in bars])]
    for cell, found in results.items():
        parts += [f"### {cell.title}"]
        if cell.per_node > 1:
            parts += ["No communication is none between machines. What is sent is each machine's."]
        parts += [_race(found)]
    if micro:
        parts += ["### A step that neither launches nor lands", _overheads(micro["overheads"])]
        parts += [
            "### A boundary, waiting left out",
            _boundaries(micro["boundaries"]),
        ]
        parts += [
            "### A boundary where ranks share the model out in islands, waiting left out",
            _shared(micro["shared"]),
        ]
    return "\n\n".join(parts) + "\n"


def _race(found: Sequence[Line]) -> str:
    head = (
        "",
        "x no comm.",
        "min",
        "max",
        "s exposed",
        "s hidden",
        "MB/step sent",
        "most in a step",
        "peak",
        "n",
    )
    rows = [
        (
            line.contender,
            *(f"{multiple:.3f}" for multiple in line.multiple),
            _number(line.exposed),
            _number(line.hidden),
            _number(line.sent_per_step, 1e6),
            _number(line.peak_sent, 1e6),
            f"{line.peak:.1f}",
            str(line.samples),
        )
        for line in found
    ]
    return markdown_table(head, rows)


def _overheads(records: Sequence[Mapping[str, Any]]) -> str:
    head = ("", "DDP's buckets", "identity hook (µs)", "commhooks, more (µs)")
    return markdown_table(
        head,
        [
            (
                r["state"],
                str(r["buckets"]),
                f"{r['identity_us']:,.0f}",
                f"{r['difference_us']:+,.0f}",
            )
            for r in records
        ],
    )


def _boundaries(records: Sequence[Mapping[str, Any]]) -> str:
    head = (
        "",
        "M parameters",
        "ms a copy",
        "boundary (copies)",
        "min",
        "max",
        "memory kept (models)",
        "kB more after round 1",
        "passing (models)",
    )
    return markdown_table(
        head,
        [
            (
                r["algorithm"],
                f"{r['parameters'] / 1e6:.1f}",
                f"{r['copy_ms']:.1f}",
                *(f"{copies:.2f}" for copies in r["copies"]),
                f"{r['extra']:.2f}",
                f"{r['grown'] / 1e3:.0f}",
                f"{r['transient']:.2f}",
            )
            for r in records
        ],
    )


def _shared(records: Sequence[Mapping[str, Any]]) -> str:
    head = (
        "",
        "M parameters",
        "ranks of an island",
        "ms, every rank alone",
        "ms, islands",
        "ms to gather the model",
        "more (gatherings)",
        "min",
        "max",
        "kept, alone (models)",
        "kept, islands (models)",
    )
    return markdown_table(
        head,
        [
            (
                r["algorithm"],
                f"{r['parameters'] / 1e6:.1f}",
                str(r["island"]),
                *(f"{r[name]:.1f}" for name in ("alone_ms", "shared_ms", "gather_ms")),
                *(f"{gatherings:.2f}" for gatherings in r["above"]),
                f"{r['extra_alone']:.2f}",
                f"{r['extra_shared']:.2f}",
            )
            for r in records
        ],
    )


def _number(value: float | None, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:.2f}"
