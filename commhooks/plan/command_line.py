"""What to take for a link and a step time: every algorithm's step time, traffic and memory.

::

    python -m commhooks.plan --params 124e6 --step-ms 300 --bandwidth 1gbit --ranks 16

finds for every algorithm, compression and island the smallest tau that hides its rounds, and ranks
them. With --tau it shows what all algorithms do with this tau.

::

    torchrun --nproc-per-node 2 -m commhooks.plan --measure --params 11e6 --step-ms 300

measures the network between the ranks that it is started on, and ranks for that. With --step it
measures the step as well.

The model is the usual one of a ring all-reduce: a message costs a latency, which is its time one
way, and its bytes cost the bandwidth. It knows no stragglers, no shared switches and no time to
copy; every link sends and receives at full speed at once. It leaves out the time that rounding
takes, unless --encode-gbs says how fast it is.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace

from commhooks.plan import table
from commhooks.plan.measure import Measured, MeasureError, launched, measure
from commhooks.plan.model import COMPRESSIONS, Network, Work, parse_count, parse_rate
from commhooks.plan.ranking import LONGEST, SMALL, choices

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what the command line asks for."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if complaint := _complaint(options):
        parser.error(complaint)
    if not options.measure:
        sys.stdout.write(_predicted(options, _network(options), options.step_ms / 1e3))
        return
    try:
        launch = launched()
        found = measure(launch, _payload(options), options.step or options.step_ms / 1e3)
    except MeasureError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    if launch.rank == 0:
        # A fixed tau is shown for one form of the machines, and one worker is nearly always right.
        island = found.network.per_node if options.tau else 1
        predicted = _predicted(options, replace(found.network, island=island), found.step)
        sys.stdout.write(f"{_measured(found, options)}\n{predicted}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m commhooks.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--params", type=_params, required=True, help="number of parameters: 124e6, 350M, 1.3B")
    add("--bytes-per-param", type=_positive, default=4.0, help="4 for fp32")
    add("--step-ms", type=_positive, help="a step without communication, in ms")
    add("--fragments", type=_count, default=4, help="of DiLoCo's streaming form")
    add("--tau", type=_count, nargs="+", help="show all algorithms with this tau, and rank none")

    network = parser.add_argument_group("the network").add_argument
    network("--bandwidth", type=_rate, help="of a machine's link: 1gbit, 100Mbps, 25MB/s")
    network("--latency-ms", type=float, help="of a message one way, half of a ping; 0")
    network("--ranks", type=_count, help="number of ranks")
    network("--per-node", type=_count, metavar="L", help="ranks of a machine, which share its link")
    network("--island", type=_count, metavar="L", help="the same, and with --tau: one worker")
    network("--inside", type=_rate, help="bandwidth inside a machine; default: costs nothing")

    ranking = parser.add_argument_group("the ranking").add_argument
    ranking("--compression", choices=COMPRESSIONS[1:], help="the only one to look at")
    ranking("--encode-gbs", type=_positive, help="GB of parameters that a rank rounds in a second")
    ranking("--longest-tau", type=_count, default=LONGEST, help=f"default: {LONGEST}")
    ranking("--small-tau", type=_count, default=SMALL, help=f"up to it, taus count alike; {SMALL}")
    ranking("--memory-mb", type=_positive, default=math.inf, help="that an algorithm may take")
    ranking("--rows", type=_count, default=10, help="of the table")

    measuring = parser.add_argument_group("measuring").add_argument
    measuring("--measure", action="store_true", help="the network, on the ranks of this launch")
    measuring("--step", metavar="MODULE:FUNCTION", help="makes one step without communication")
    return parser


def _complaint(options: argparse.Namespace) -> str | None:
    """What is wrong with the options together."""
    if options.measure:
        return _complaint_of_measuring(options)
    if options.step:
        return "--step is for --measure; say how long a step takes with --step-ms"
    missing = [n for n in ("step_ms", "bandwidth", "ranks") if getattr(options, n) is None]
    if missing:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        return f"{names} must be given, or --measure"
    if options.ranks < 2 or (options.latency_ms or 0) < 0:
        return "there must be 2 ranks at least, and no latency below 0"
    sizes = {size for size in (options.per_node, options.island) if size}
    if len(sizes) > 1:
        return "--per-node and --island must be the same number"
    if any(options.ranks % size or options.ranks == size for size in sizes):
        return "--island and --per-node must divide --ranks, into 2 machines at least"
    return None


def _complaint_of_measuring(options: argparse.Namespace) -> str | None:
    known = ("bandwidth", "latency_ms", "ranks", "per_node", "island", "inside")
    if given := [name for name in known if getattr(options, name) is not None]:
        return f"--measure finds out by itself: --{given[0].replace('_', '-')}"
    if (options.step is None) == (options.step_ms is None):
        return "--measure needs one of --step-ms and --step module:function"
    if options.step is not None and not all(options.step.partition(":")):
        return f"--step wants module:function, such as train:step, and not {options.step!r}"
    return None


def _payload(options: argparse.Namespace) -> float:
    payload: float = options.params * options.bytes_per_param
    return payload


def _network(options: argparse.Namespace) -> Network:
    return Network(
        options.ranks,
        options.bandwidth,
        (options.latency_ms or 0.0) / 1e3,
        island=options.island or 1,
        per_node=options.per_node or options.island or 1,
        inside=options.inside or math.inf,
    )


def _predicted(options: argparse.Namespace, network: Network, step: float) -> str:
    rate = options.encode_gbs * 1e9 if options.encode_gbs else math.inf
    work = Work(_payload(options), step, options.compression, rate)
    if options.tau:
        return table.of_fixed_tau(work, network, options.fragments, options.tau)
    ranked = choices(
        work,
        network,
        fragments=options.fragments,
        longest=options.longest_tau,
        small=options.small_tau,
        compressions=[options.compression] if options.compression else COMPRESSIONS,
        memory=options.memory_mb * 1e6,
    )
    return table.of_ranking(
        ranked, rows=options.rows, longest=options.longest_tau, small=options.small_tau
    )


def _measured(found: Measured, options: argparse.Namespace) -> str:
    """What was measured, in two sentences."""
    network = found.network
    joined = replace(network, island=network.per_node)
    round_ms = Work(_payload(options), found.step).round_seconds(joined) * 1e3
    several = network.per_node > 1
    machines = f" on {joined.workers} machines" if several else ""
    inside = f", {network.inside / 1e9:,.3g} Gbit/s inside a machine" if several else ""
    source = "measured" if options.step else "as given"
    return (
        f"{network.ranks} ranks{machines} over {found.backend}: a link carries "
        f"{network.bandwidth / 1e6:,.4g} Mbit/s, a message takes {network.latency * 1e3:,.3g} ms "
        f"one way{inside}.\n"
        f"A round of the whole model takes {round_ms:,.1f} ms, and a step without communication "
        f"{found.step * 1e3:,.1f} ms ({source}).\n"
    )


def _params(text: str) -> float:
    try:
        return parse_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _rate(text: str) -> float:
    try:
        return parse_rate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value
