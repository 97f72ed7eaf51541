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

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Network",
    "Prediction",
    "Work",
    "algorithms",
    "hiding_delay",
    "hiding_tau",
    "parse_rate",
    "predict",
]

# An Ethernet frame of 1514 bytes carries 1448 of them, the rest is Ethernet's, IP's and TCP's.
_HEADERS = 1514 / 1448
# TCP does not keep a link busy all the time; the tests hold this to measurements on shaped links.
_BUSY = 0.97
_FIRST_BUCKET_BYTES = 2**20
_BUCKET_BYTES = 25 * 2**20
_UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_FORWARD = 1 / 3
# A block of 256 numbers in fp32 is 1024 bytes; rounded to integers it has a scale of 4 bytes.
_SENT = {None: 1.0, "bf16": 512 / 1024, "int8": 260 / 1024, "int4": 132 / 1024}


@dataclass(frozen=True)
class Network:
    """Ranks that are joined by equal links.

    Attributes:
        ranks: number of them.
        bandwidth: of a machine's link in each direction, in bit/s.
        latency: of a message, in seconds.
        island: how many ranks share a machine and its link, and make one worker.
    """

    ranks: int
    bandwidth: float
    latency: float = 0.0
    island: int = 1

    @property
    def workers(self) -> int:
        """Number of workers, m."""
        return self.ranks // self.island

    def wire_bytes(self, payload: float) -> float:
        """Bytes that an all-reduce of ``payload`` bytes puts on each link: 2 (m - 1) / m of it.

        The ranks of an island send a share each, which together is as much.
        """
        return 2 * (self.workers - 1) / self.workers * payload * _HEADERS

    def all_reduce_seconds(self, payload: float) -> float:
        """Seconds of a ring all-reduce: 2 (m - 1) messages, one after the other."""
        messages = 2 * (self.workers - 1)
        return messages * self.latency + 8 * self.wire_bytes(payload) / (_BUSY * self.bandwidth)


@dataclass(frozen=True)
class Work:
    """What is trained.

    Attributes:
        payload: bytes of the parameters (and of the gradients), in the averaged format.
        step: seconds of a step that does not communicate.
        compression: what rounds are rounded to; None for nothing.
    """

    payload: float
    step: float
    compression: str | None = None

    @property
    def sent(self) -> float:
        """Bytes that stand for the parameters in a round."""
        return self.payload * _SENT[self.compression]

    def kept(self, algorithm: Algorithm, network: Network) -> float:
        """Bytes of memory that ``algorithm`` keeps on a rank besides the model."""
        models: float = algorithm.models
        if self.compression is not None and algorithm.kind != "step" and network.workers > 1:
            # e and r, the residual of what a rank owns, and what is sent and received, encoded.
            encoded = _SENT[self.compression] * (3 + 1 / network.workers)
            models += 1 + (not algorithm.differences) + 1 / network.workers + encoded
        if network.island == 1 or algorithm.kind == "step":
            return models * self.payload
        return (models / network.island + 1) * self.payload


@dataclass(frozen=True)
class Algorithm:
    """When an algorithm communicates, and what it keeps.

    Attributes:
        name: of the state, with the arguments that matter here.
        kind: "step" (gradients, at every step), "blocking" or "overlapped".
        models: extra memory, in units of the parameters.
        differences: whether it averages differences, of which compression keeps no reference.
        fragments: parts of the model whose rounds take turns.
        delay: from the launch of an overlapped round to its landing, in units of tau.
    """

    name: str
    kind: str
    models: int
    fragments: int = 1
    delay: float = 1.0
    differences: bool = False

    def delay_steps(self, tau: int) -> int:
        """Steps from the launch of a round to its landing; a blocking one lands at once."""
        return math.floor(self.delay * tau) if self.kind == "overlapped" else 0


def algorithms(fragments: int = 4) -> tuple[Algorithm, ...]:
    """All algorithms; the streaming form of DiLoCo with so many fragments.

    DiLoCo is taken with its default, an SGD with momentum outside: it keeps z, the wire and the
    momentum. An outer optimizer without state takes 1 model less, AdamW 1 more.
    """
    streaming = f"DiLoCo, fragments={fragments}, delay=tau/{fragments}"
    return (
        Algorithm("AllReduce", "step", 0),
        Algorithm("LocalSGD", "blocking", 1),
        Algorithm("BMUF", "blocking", 3),
        Algorithm("SlowMo", "blocking", 3),
        Algorithm("DiLoCo", "blocking", 3, differences=True),
        Algorithm("DiLoCo, delay=tau", "overlapped", 3, differences=True),
        Algorithm("DiLoCo, delay=tau, merge=carry", "overlapped", 4, differences=True),
        Algorithm(streaming, "overlapped", 3, fragments, 1 / fragments, differences=True),
        Algorithm("OverlapLocalSGD", "overlapped", 1),
        Algorithm("OverlapLocalSGD, beta > 0", "overlapped", 3),
        Algorithm("EASGD", "overlapped", 1),
        Algorithm("CoCoDSGD", "overlapped", 2),
    )


ALGORITHMS = algorithms()


@dataclass(frozen=True)
class Prediction:
    """What one algorithm will do, on average over its rounds.

    Attributes:
        algorithm: which one.
        tau: steps between averagings; 1 for what averages gradients at every step.
        delay: steps from the launch of a round to its landing.
        step: seconds of a step, communication included.
        exposed: seconds of communication that the training thread waits for, a step.
        hiding: seconds that the steps of the delay compute, under which a round is hidden.
        round: bytes of one round's payload: a fragment, or the gradients of a step.
        sent: bytes on each link, headers included, a step.
        peak: the most bytes that the rounds launched after one step put on each link.
        memory: extra bytes.
    """

    algorithm: Algorithm
    tau: int
    delay: int
    step: float
    exposed: float
    hiding: float
    round: float
    sent: float
    peak: float
    memory: float


def predict(algorithm: Algorithm, tau: int, work: Work, network: Network) -> Prediction:
    """Predict one algorithm.

    Args:
        algorithm: one of :data:`ALGORITHMS`.
        tau: steps between averagings; of no meaning for what averages at every step.
        work: what is trained.
        network: what joins the ranks.
    """
    payload = work.payload if algorithm.kind == "step" else work.sent
    fragments, part = algorithm.fragments, payload / algorithm.fragments
    if algorithm.kind == "step":
        tau = 1
        exposed = _exposed_under_backward(work, network)
    else:
        # A round is hidden by the steps before it lands, but a link carries one after the other:
        # where they take longer than the steps from one launch to the next, they set the pace.
        under = min(algorithm.delay_steps(tau), tau / fragments) * work.step
        exposed = fragments / tau * max(0.0, network.all_reduce_seconds(part) - under)
    delay = algorithm.delay_steps(tau)
    return Prediction(
        algorithm=algorithm,
        tau=tau,
        delay=delay,
        step=work.step + exposed,
        exposed=exposed,
        hiding=delay * work.step,
        round=part,
        sent=network.wire_bytes(payload) / tau,
        # With more fragments than steps, several are launched after the same one.
        peak=math.ceil(fragments / tau) * network.wire_bytes(part),
        memory=work.kept(algorithm, network),
    )


def hiding_tau(work: Work, network: Network) -> int:
    """The smallest tau whose steps take as long as the all-reduce they are to hide."""
    return max(1, math.ceil(network.all_reduce_seconds(work.sent) / work.step))


def hiding_delay(work: Work, network: Network, fragments: int = 1) -> int:
    """The smallest delay, in steps, under which the round of one of ``fragments`` is hidden."""
    return max(1, math.ceil(network.all_reduce_seconds(work.sent / fragments) / work.step))


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


def _table(shown: Sequence[Algorithm], work: Work, network: Network, taus: Sequence[int]) -> str:
    heading = ("algorithm", "tau", "delay", "step", "exposed", "MB/step", "peak MB", "memory MB")
    rows = [heading]
    for algorithm in shown:
        for tau in (1,) if algorithm.kind == "step" else taus:
            found = predict(algorithm, tau, work, network)
            rows.append(
                (
                    algorithm.name,
                    str(found.tau),
                    str(found.delay),
                    f"{found.step * 1e3:,.1f}",
                    f"{found.exposed * 1e3:,.1f}",
                    f"{found.sent / 1e6:,.1f}",
                    f"{found.peak / 1e6:,.1f}",
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
    parser.add_argument("--ranks", type=int, required=True, help="number of ranks")
    parser.add_argument("--bytes-per-param", type=_positive, default=4.0, help="4 for fp32")
    parser.add_argument("--tau", type=int, nargs="+", help="default: around the one that hides all")
    parser.add_argument("--fragments", type=int, default=4, help="of DiLoCo's streaming form")
    parser.add_argument(
        "--island", type=int, default=1, help="ranks of a machine, which make one worker"
    )
    parser.add_argument(
        "--compression", choices=[name for name in _SENT if name], help="what a round is rounded to"
    )
    options = parser.parse_args(arguments)
    if options.ranks < 2 or options.latency_ms < 0 or min(options.tau or [1]) < 1:
        parser.error("there must be 2 ranks at least, tau 1 at least, and no latency below 0")
    if options.fragments < 1:
        parser.error("there must be 1 fragment at least")
    if options.island < 1 or options.ranks % options.island or options.ranks == options.island:
        parser.error("--island must divide --ranks, into 2 islands at least")
    network = Network(options.ranks, options.bandwidth, options.latency_ms / 1e3, options.island)
    payload = options.params * options.bytes_per_param
    work = Work(payload, options.step_ms / 1e3, options.compression)
    best = hiding_tau(work, network)
    taus = options.tau or sorted({max(1, best // 4), max(1, best // 2), best, 2 * best})
    reduction = network.all_reduce_seconds(work.sent)
    part = network.all_reduce_seconds(work.sent / options.fragments)
    delay = hiding_delay(work, network, options.fragments)
    sys.stdout.write(
        f"{_table(algorithms(options.fragments), work, network, taus)}\n\n"
        "step and exposed in ms. MB/step: on each link, on average; peak: what the rounds launched "
        "after one step send.\n"
        f"A round of the whole model takes {reduction * 1e3:,.1f} ms. The smallest tau that "
        f"hides it under the steps is {best}.\n"
        f"One of a fragment ({options.fragments} in all) takes {part * 1e3:,.1f} ms, which a delay "
        f"of {delay} hides.\n"
    )


if __name__ == "__main__":
    main()
