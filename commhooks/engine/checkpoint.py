"""A state's vectors and counters as tensors and plain values, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from commhooks.engine.rounds.findings import Findings
from commhooks.engine.rules import Rules
from commhooks.errors import CheckpointError

if TYPE_CHECKING:
    from commhooks.engine.rounds.fragment import Fragment

__all__ = ["check_identity", "check_values"]

FORMAT = 7
"""Version of the dictionary's layout; a later one that reads differently gets another number.

3 added the parameters' ``shapes``, since not every state keeps vectors to tell another model by; 4
took out the layout of DDP's gradient buckets and gave every fragment a schedule of its own; 5 says
which share of its island's model a rank has; 6 has a tau that changes, and what the ranks have told
one another with their last round.
"""

_COUNTERS = {
    "schedule": ("step", "origin"),
    "cycle": ("start", "tau", "next_tau"),
    "meter": ("rounds_launched", "rounds_used", "bytes_reduced"),
}
_IDENTITY = (
    "format",
    "algorithm",
    "hyperparameters",
    "world_size",
    "rank",
    "island_size",
    "place",
)
_SECONDS = ("seconds_exposed", "seconds_hidden")
_FLAGS = ("started", "drifted", "disabled")


def check_identity(saved: object, mine: Mapping[str, Any]) -> None:
    """Compare what a checkpoint says of itself with what a state would write.

    Raises:
        CheckpointError: another format, or they differ; every difference is named.
    """
    if not isinstance(saved, Mapping):
        raise CheckpointError(
            f"Expected what state.state_dict() gave, a dictionary, got a {type(saved).__name__}."
        )
    if saved.get("format") != FORMAT:
        raise CheckpointError(
            f"The checkpoint is of format {saved.get('format')!r}, this version of commhooks "
            f"reads {FORMAT}; go on with the version that wrote it."
        )
    differences = [
        f"{name} is {saved.get(name)!r} in the checkpoint and {value!r} here"
        for name, value in mine.items()
        if saved.get(name) != value
    ]
    if differences:
        raise CheckpointError(
            "The checkpoint belongs to another run: " + "; ".join(differences) + "."
        )


def check_values(
    saved: Mapping[str, Any],
    fragments: Sequence[Fragment],
    vectors: Sequence[str] | None,
    rules: Rules,
    pieces: Sequence[Sequence[int]] | None,
) -> None:
    """Refuse a checkpoint that is damaged or of another model, before any of it is used.

    Args:
        saved: what :meth:`Saving.state_dict` gave.
        fragments: those of this run.
        vectors: names of the vectors that will be used; None if none will.
        rules: the algorithm.
        pieces: sizes of the residuals E of compressed rounds, for every fragment; None if they will
            not be used.

    Raises:
        CheckpointError: it is; what is wrong is named.
    """
    unknown = set(saved) - {*_IDENTITY, *_COUNTERS, *_FLAGS, "fragments", "losses"}
    if unknown:
        _refuse(
            "the dictionary", "what state.state_dict() gave", f"also {sorted(map(repr, unknown))}"
        )
    size, rank = saved.get("world_size"), saved.get("rank")
    if _counter(rank, "rank") >= _counter(size, "world_size"):
        _refuse("rank", f"below {size}", rank)
    size, place = saved.get("island_size"), saved.get("place")
    if _counter(place, "place") >= _counter(size, "island_size"):
        _refuse("place", f"below {size}", place)
    for group, names in _COUNTERS.items():
        values = _mapping(saved, group)
        for name in names:
            _counter(values.get(name), f"{group}.{name}")
    for name in _SECONDS:
        seconds = saved["meter"].get(name)
        if not isinstance(seconds, float) or not math.isfinite(seconds) or seconds < 0:
            _refuse(f"meter.{name}", "a number of seconds", seconds)
    for name in _FLAGS:
        if not isinstance(saved.get(name), bool):
            _refuse(name, "True or False", saved.get(name))
    known = {*_SECONDS, *(name for names in _COUNTERS.values() for name in names)}
    if unknown := {*saved["schedule"], *saved["meter"], *saved["cycle"]} - known:
        _refuse("schedule, cycle or meter", f"only {sorted(known)}", unknown)
    _check_losses(_mapping(saved, "losses"))
    _check_cycle(saved["cycle"], saved["schedule"], rules)
    parts = saved.get("fragments")
    if not isinstance(parts, Sequence) or len(parts) != len(fragments):
        _refuse("fragments", f"a list of {len(fragments)}", parts)
    for number, (part, fragment) in enumerate(zip(parts, fragments, strict=True)):
        where = f"fragments[{number}]"
        if not isinstance(part, Mapping):
            _refuse(where, "a dictionary", part)
        _check_shapes(part.get("shapes"), fragment.shapes)
        turn = -(-(number + 1) * saved["cycle"]["tau"] // len(fragments))
        _check_schedule(part, saved["cycle"], turn, fragment, where, varies=_varies(rules))
        _check_findings(part, saved["world_size"] // saved["island_size"], where)
        if vectors is not None:
            launched = part["begun"]
            _check_rates(part.get("rates"), rules, fragment, where, launched=launched)
            _check_vectors(_mapping(part, "vectors"), vectors, fragment, where)
            # Of an empty share nothing is kept.
            keeper = rules if fragment.templates else Rules()
            sizes = None if pieces is None else pieces[number]
            _check_wires(part.get("wires"), rules, fragment, sizes, f"{where}.wires")
            keeper.check_kept(fragment.templates, part.get("kept"), launched=launched)


def _check_wires(
    saved: object,
    rules: Rules,
    fragment: Fragment,
    pieces: Sequence[int] | None,
    where: str,
) -> None:
    # A run of one worker sends nothing, and so compresses nothing.
    if saved is None and (rules.compression is None or not pieces):
        return
    if not isinstance(saved, Mapping) or set(saved) != {"e", "E", "r"} or rules.compression is None:
        _refuse(where, "what compressed rounds leave over", saved)
    _check_tensors(saved["e"], fragment.templates, f"{where}.e")
    _check_tensors(
        saved["r"], [] if rules.contributes_differences else fragment.templates, f"{where}.r"
    )
    if pieces is not None:
        dtypes = [bucket.dtype for bucket in fragment.buckets]
        like = [
            torch.empty(size, dtype=dtype, device="meta")
            for size, dtype in zip(pieces, dtypes, strict=True)
        ]
        # Which depend on how the buckets are cut.
        _check_tensors(saved["E"], like, f"{where}.E, with the bucket_cap_mb of the saved run,")


def _check_rates(
    rates: object, rules: Rules, fragment: Fragment, where: str, *, launched: bool
) -> None:
    if not (launched and rules.looks_at_rates):
        if rates is not None:
            _refuse(f"{where}.rates", "None", rates)
        return
    fits = isinstance(rates, list) and len(rates) == len(fragment.parameters)
    if not fits or not all(rate is None or _is_rate(rate) for rate in rates):  # type: ignore[attr-defined]
        _refuse(f"{where}.rates", "a learning rate for every parameter", rates)


def _is_rate(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value >= 0


def _check_shapes(saved: object, mine: Sequence[Sequence[int]]) -> None:
    if saved == mine:
        return
    if not isinstance(saved, list) or not all(isinstance(shape, list) for shape in saved):
        _refuse("shapes", "a list of shapes", saved)
    position = next(
        (i for i, (a, b) in enumerate(zip(saved, mine, strict=False)) if a != b),
        min(len(saved), len(mine)),
    )
    raise CheckpointError(
        f"The checkpoint is of another model: {len(saved)} parameters, here {len(mine)}; they "
        f"first differ at parameter number {position}, {saved[position : position + 1]} in the "
        f"checkpoint and {mine[position : position + 1]} here."
    )


def _varies(rules: Rules) -> bool:
    return not isinstance(rules.tau, int)


def _check_cycle(cycle: Mapping[str, int], steps: Mapping[str, int], rules: Rules) -> None:
    if not _varies(rules):
        if cycle["tau"] != rules.tau or cycle["next_tau"] != rules.tau:
            _refuse("cycle.tau and cycle.next_tau", str(rules.tau), cycle)
        after = cycle["start"] - steps["origin"]
        if after < 0 or after % cycle["tau"]:
            _refuse("cycle.start", "origin + a multiple of tau", cycle["start"])
    elif cycle["start"] < steps["origin"] or min(cycle["tau"], cycle["next_tau"]) < 1:
        _refuse("cycle", "a start from the origin on, and numbers of steps from 1", cycle)


def _check_losses(losses: Mapping[str, Any]) -> None:
    if set(losses) != {"sum", "count", "first"}:
        _refuse("losses", "a sum, a count and the first", losses)
    _counter(losses["count"], "losses.count")
    for name, missing in (("sum", None if losses["count"] else 0.0), ("first", None)):
        value = losses[name]
        number = isinstance(value, float) and math.isfinite(value)
        if value != missing and (not number or missing is not None):
            _refuse(f"losses.{name}", f"a number or {missing}", value)


def _check_schedule(
    part: Mapping[str, Any],
    cycle: Mapping[str, int],
    turn: int,
    fragment: Fragment,
    where: str,
    *,
    varies: bool,
) -> None:
    if not isinstance(part.get("begun"), bool):
        _refuse(f"{where}.begun", "True or False", part.get("begun"))
    launch, landing = part.get("launch"), part.get("landing")
    launch = _counter(launch, f"{where}.launch")
    # In this cycle, or in the next one if it has launched in this one. Where tau has become
    # shorter, it waits for the landing of the round before.
    turns = (cycle["start"] + turn, cycle["start"] + cycle["tau"] + turn)
    if launch not in turns and not (varies and launch == landing):
        _refuse(f"{where}.launch", f"one of {turns}", launch)
    if landing is None:
        return
    landing = _counter(landing, f"{where}.landing")
    # That of the round launched last, or of what the vectors started with.
    delay = fragment.schedule.delay
    if varies:
        good = landing <= launch if delay is not None else landing == launch
    else:
        good = landing == (launch if delay is None else launch - cycle["tau"] + delay)
    if not good:
        _refuse(f"{where}.landing", "the delay after a launch", landing)


def _check_findings(part: Mapping[str, Any], m: int, where: str) -> None:
    for name in ("moved", "together"):
        value = part.get(name)
        if not isinstance(value, float) or not math.isfinite(value) or value < 0:
            _refuse(f"{where}.{name}", "a number from 0", value)
    for name in ("findings", "newer", "seen"):
        found = part.get(name)
        wanted = None if found is None else Findings.refusal(found, m)
        if wanted is not None or name not in part:
            _refuse(f"{where}.{name}", wanted or "there", found)


def _check_vectors(
    saved: Mapping[str, Any], names: Sequence[str], fragment: Fragment, where: str
) -> None:
    if set(saved) != set(names):
        _refuse(f"{where}.vectors", f"the vectors {sorted(names)}", sorted(map(str, saved)))
    for name, parts in saved.items():
        _check_tensors(parts, fragment.templates, f"{where}.vectors[{name!r}]")


def _check_tensors(saved: object, alike: Sequence[Tensor], where: str) -> None:
    if not isinstance(saved, Sequence) or len(saved) != len(alike):
        _refuse(where, f"{len(alike)} tensors", saved)
    for number, (part, like) in enumerate(zip(saved, alike, strict=True)):
        mine = (like.dtype, like.shape)
        found = (part.dtype, part.shape) if isinstance(part, Tensor) else type(part).__name__
        if found != mine:
            _refuse(f"{where}[{number}]", f"a tensor {like.dtype} {tuple(like.shape)}", found)
        if not torch.isfinite(part).all():
            _refuse(f"{where}[{number}]", "finite", "NaN or inf")


def _mapping(saved: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = saved.get(name)
    if not isinstance(value, Mapping):
        _refuse(name, "a dictionary", value)
    return value


def _counter(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        _refuse(name, "a number from 0", value)
    return value


def _refuse(name: str, wanted: str, found: object) -> NoReturn:
    shown = repr(found)
    raise CheckpointError(
        f"The checkpoint is damaged: {name} should be {wanted}, found "
        f"{shown if len(shown) < 100 else shown[:100] + '...'}. Nothing has been loaded."
    )
