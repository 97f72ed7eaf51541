"""What a network will cost: step time, traffic and memory of every algorithm, predicted.

::

    python -m commhooks.plan --params 124e6 --step-ms 300 --bandwidth 1gbit --ranks 16

The model is the usual one of a ring all-reduce: a message costs a latency and its bytes cost the
bandwidth. It knows no stragglers, no shared switches and no time to copy; every link sends and
receives at full speed at once.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ALGORITHMS", "Algorithm", "Network", "Prediction", "Work", "parse_rate", "predict"]

# An Ethernet frame of 1514 bytes carries 1448 of them, the rest is Ethernet's, IP's and TCP's.
_HEADERS = 1514 / 1448
# TCP does not keep a link busy all the time; the tests hold this to measurements on shaped links.
_BUSY = 0.97
_FIRST_BUCKET_BYTES = 2**20
_BUCKET_BYTES = 25 * 2**20
_UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_FORWARD = 1 / 3


@dataclass(frozen=True)
class Network:
    """Ranks that are joined by equal links.

    Attributes:
        ranks: number of them, m.
        bandwidth: of a link in each direction, in bit/s.
        latency: of a message, in seconds.
    """

    ranks: int
    bandwidth: float
    latency: float = 0.0

    def wire_bytes(self, payload: float) -> float:
        """Bytes that an all-reduce of ``payload`` bytes puts on each link: 2 (m - 1) / m of it."""
        return 2 * (self.ranks - 1) / self.ranks * payload * _HEADERS

    def all_reduce_seconds(self, payload: float) -> float:
        """Seconds of a ring all-reduce: 2 (m - 1) messages, one after the other."""
        messages = 2 * (self.ranks - 1)
        return messages * self.latency + 8 * self.wire_bytes(payload) / (_BUSY * self.bandwidth)


@dataclass(frozen=True)
class Work:
    """What is trained.

    Attributes:
        payload: bytes of the parameters (and of the gradients), in the averaged format.
        step: seconds of a step that does not communicate.
    """

    payload: float
    step: float


@dataclass(frozen=True)
class Algorithm:
    """When an algorithm communicates, and what it keeps.

    Attributes:
        name: of the state.
        kind: "step", "blocking" or "overlapped".
        models: extra memory, in units of the parameters.
    """

    name: str
    kind: str
    models: int


ALGORITHMS = (
    Algorithm("AllReduce", "step", 0),
    Algorithm("LocalSGD", "blocking", 1),
    Algorithm("BMUF", "blocking", 3),
    Algorithm("OverlapLocalSGD", "overlapped", 1),
    Algorithm("OverlapLocalSGD, beta > 0", "overlapped", 3),
    Algorithm("EASGD", "overlapped", 1),
    Algorithm("CoCoDSGD", "overlapped", 2),
)


@dataclass(frozen=True)
class Prediction:
    """What one algorithm will do, on average over its rounds.

    Attributes:
        algorithm: which one.
        tau: steps between averagings; 1 for what averages gradients at every step.
        step: seconds of a step, communication included.
        exposed: seconds of communication that the training thread waits for, a step.
        sent: bytes on each link, headers included, a step.
        memory: extra bytes.
    """

    algorithm: Algorithm
    tau: int
    step: float
    exposed: float
    sent: float
    memory: float


def predict(algorithm: Algorithm, tau: int, work: Work, network: Network) -> Prediction:
    """Predict one algorithm.

    Args:
        algorithm: one of :data:`ALGORITHMS`.
        tau: steps between averagings; of no meaning for what averages at every step.
        work: what is trained.
        network: what joins the ranks.
    """
    reduction = network.all_reduce_seconds(work.payload)
    if algorithm.kind == "step":
        tau = 1
        exposed = _exposed_under_backward(work, network)
    elif algorithm.kind == "blocking":
        exposed = reduction / tau
    else:
        # A round takes the longer of the two: the all-reduce, or the steps that hide it.
        exposed = max(0.0, reduction / tau - work.step)
    return Prediction(
        algorithm=algorithm,
        tau=tau,
        step=work.step + exposed,
        exposed=exposed,
        sent=network.wire_bytes(work.payload) / tau,
        memory=algorithm.models * work.payload,
    )


def hiding_tau(work: Work, network: Network) -> int:
    """The smallest tau whose steps take as long as the all-reduce they are to hide."""
    return max(1, math.ceil(network.all_reduce_seconds(work.payload) / work.step))


def parse_rate(text: str) -> float:
    """``"200mbit"`` as bit/s; tc's notation.

    Raises:
        ValueError: it is no rate.
    """
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = text[len(number) :]
    if unit not in _UNITS:
        raise ValueError(f"{text!r} is no rate; write 200mbit or 1gbit")
    return float(number) * _UNITS[unit]


def _exposed_under_backward(work: Work, network: Network) -> float:
    """What is left when gradients are sent bucket by bucket as backward makes them.

    Backward takes two thirds of the step. DDP's first bucket holds 1 MiB and the others 25.
    """
    begun, backward = _FORWARD * work.step, (1 - _FORWARD) * work.step
    produced = free_at = 0.0
    while produced < work.payload:
        room = _BUCKET_BYTES if produced else _FIRST_BUCKET_BYTES
        bucket = min(room, work.payload - produced)
        produced += bucket
        ready = begun + backward * produced / work.payload
        free_at = max(ready, free_at) + network.all_reduce_seconds(bucket)
    return max(0.0, free_at - work.step)


def _table(work: Work, network: Network, taus: Sequence[int]) -> str:
    heading = ("algorithm", "tau", "step (ms)", "exposed (ms)", "MB/step", "memory (MB)")
    rows = [heading]
    for algorithm in ALGORITHMS:
        for tau in (1,) if algorithm.kind == "step" else taus:
            found = predict(algorithm, tau, work, network)
            rows.append(
                (
                    algorithm.name,
                    str(found.tau),
                    f"{found.step * 1e3:,.1f}",
                    f"{found.exposed * 1e3:,.1f}",
                    f"{found.sent / 1e6:,.1f}",
                    f"{found.memory / 1e6:,.0f}",
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the predictions that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m commhooks.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--params", type=_positive, required=True, help="number of parameters")
    parser.add_argument(
        "--step-ms", type=_positive, required=True, help="a step without communication, in ms"
    )
    parser.add_argument("--bandwidth", type=_rate, required=True, help="of a link, such as 1gbit")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="of a message, in ms")
    parser.add_argument("--ranks", type=int, required=True, help="number of workers")
    parser.add_argument("--bytes-per-param", type=_positive, default=4.0, help="4 for fp32")
    parser.add_argument("--tau", type=int, nargs="+", help="default: around the one that hides all")
    options = parser.parse_args(arguments)
    if options.ranks < 2 or options.latency_ms < 0 or min(options.tau or [1]) < 1:
        parser.error("there must be 2 ranks at least, tau 1 at least, and no latency below 0")
    network = Network(options.ranks, options.bandwidth, options.latency_ms / 1e3)
    work = Work(options.params * options.bytes_per_param, options.step_ms / 1e3)
    best = hiding_tau(work, network)
    taus = options.tau or sorted({max(1, best // 4), max(1, best // 2), best, 2 * best})
    reduction = network.all_reduce_seconds(work.payload)
    sys.stdout.write(
        f"{_table(work, network, taus)}\n\n"
        f"An all-reduce of the parameters takes {reduction * 1e3:,.1f} ms. The smallest tau that "
        f"hides it under the steps is {best}.\n"
    )


if __name__ == "__main__":
    main()
