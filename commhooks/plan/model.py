"""The cost model: step time, traffic and memory of an algorithm on a network.

The model is the usual one of a ring all-reduce: a message costs a latency and its bytes cost the
bandwidth. It knows no stragglers, no shared switches and no time to copy; every link sends and
receives at full speed at once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

__all__ = [
    "ALGORITHMS",
    "COMPRESSIONS",
    "Algorithm",
    "Network",
    "Prediction",
    "Work",
    "algorithms",
    "exposed_inside",
    "exposed_rounds",
    "gathering_seconds",
    "hiding_delay",
    "hiding_tau",
    "parse_count",
    "parse_rate",
    "predict",
]

# An Ethernet frame of 1514 bytes carries 1448 of them, the rest is Ethernet's, IP's and TCP's.
_HEADERS = 1514 / 1448
# TCP does not keep a link busy all the time; the tests hold this to measurements on shaped links.
_BUSY = 0.97
_FIRST_BUCKET_BYTES = 2**20
_BUCKET_BYTES = 25 * 2**20
_THOUSANDS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_NUMBER = r"\s*([0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)\s*"
_RATE = re.compile(_NUMBER + r"([kmgt]?)(bits?/s|bits?|bps|b/s|bytes?/s)\s*", re.IGNORECASE)
_COUNT = re.compile(_NUMBER + r"([kmbgt]?)\s*", re.IGNORECASE)
_FORWARD = 1 / 3
# A block of 256 numbers in fp32 is 1024 bytes; rounded to integers it has a scale of 4 bytes.
_SENT = {None: 1.0, "bf16": 512 / 1024, "int8": 260 / 1024, "int4": 132 / 1024}

COMPRESSIONS = tuple(_SENT)
"""What rounds can be rounded to, the finest first; None rounds nothing."""


@dataclass(frozen=True)
class Network:
    """Ranks that are joined by equal links.

    Attributes:
        ranks: number of them.
        bandwidth: of a machine's link in each direction, in bit/s.
        latency: of a message from one rank to another, one way, in seconds.
        island: how many ranks share a machine and its link, and make one worker.
        per_node: how many ranks share a machine and its link, where they are workers by themselves.
        inside: bandwidth between the ranks of a machine, in bit/s.
    """

    ranks: int
    bandwidth: float
    latency: float = 0.0
    island: int = 1
    per_node: int = 1
    inside: float = math.inf

    @property
    def workers(self) -> int:
        """Number of workers, m."""
        return self.ranks // self.island

    @property
    def sharing(self) -> int:
        """Number of workers that share a link."""
        return max(1, self.per_node // self.island)

    def wire_bytes(self, payload: float, *, two_shots: bool = False) -> float:
        """Bytes that an all-reduce of ``payload`` bytes puts on each link: 2 (m - 1) / m of it.

        The ranks of an island send a share each, which together is as much. A ring over workers
        that share a link passes each machine once, and is as much too. Of two shots only the second
        is such a ring. In the first, each of the workers that share a link sends a piece to every
        worker of the other machines.
        """
        ring = (self.workers - 1) / self.workers
        first = self.sharing * (self.workers - self.sharing) / self.workers if two_shots else ring
        return (first + ring) * payload * _HEADERS

    def all_reduce_seconds(self, payload: float, *, two_shots: bool = False) -> float:
        """Seconds of a ring all-reduce: 2 (m - 1) messages, one after the other."""
        messages = 2 * (self.workers - 1)
        sent = self.wire_bytes(payload, two_shots=two_shots)
        return messages * self.latency + 8 * sent / (_BUSY * self.bandwidth)

    def rate_of(self, payload: float, seconds: float) -> float:
        """The bandwidth at which :meth:`all_reduce_seconds` is as long as was measured.

        A small payload may take hardly longer than its messages do. Then a tenth of the time is
        put down to its bytes, since no link is infinitely fast.
        """
        messages = 2 * (self.workers - 1) * self.latency
        return 8 * self.wire_bytes(payload) / (_BUSY * max(seconds - messages, seconds / 10))

    def machine(self) -> Network:
        """The ranks of one island, joined by what joins them inside a machine."""
        return Network(self.island, self.inside)


@dataclass(frozen=True)
class Work:
    """What is trained.

    Attributes:
        payload: bytes of the parameters (and of the gradients), in the averaged format.
        step: seconds of a step that does not communicate.
        compression: what rounds are rounded to; None for nothing.
        encoding: bytes of parameters that a rank rounds, or restores, in a second.
    """

    payload: float
    step: float
    compression: str | None = None
    encoding: float = math.inf

    @property
    def sent(self) -> float:
        """Bytes that stand for the parameters in a round."""
        return self.payload * _SENT[self.compression]

    def round_seconds(self, network: Network, fragments: int = 1) -> float:
        """Seconds from the launch of the round of one of ``fragments`` to its end.

        A rank rounds its share of the model once, and restores it once.
        """
        rounded = self.compression is not None
        sending = network.all_reduce_seconds(self.sent / fragments, two_shots=rounded)
        rounding = 2 * self.payload / fragments / network.island / self.encoding if rounded else 0.0
        return sending + rounding

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
    averages_gradients = algorithm.kind == "step"
    payload = work.payload if averages_gradients else work.sent
    fragments, part = algorithm.fragments, payload / algorithm.fragments
    if averages_gradients:
        tau = 1
        exposed = _exposed_under_backward(work, network)
    else:
        exposed = exposed_rounds(algorithm, tau, work, network)
        exposed += exposed_inside(work, network) + gathering_seconds(work, network) / tau
    delay = algorithm.delay_steps(tau)
    two_shots = work.compression is not None and not averages_gradients
    return Prediction(
        algorithm=algorithm,
        tau=tau,
        delay=delay,
        step=work.step + exposed,
        exposed=exposed,
        hiding=delay * work.step,
        round=part,
        sent=network.wire_bytes(payload, two_shots=two_shots) / tau,
        # With more fragments than steps, several are launched after the same one.
        peak=math.ceil(fragments / tau) * network.wire_bytes(part, two_shots=two_shots),
        memory=work.kept(algorithm, network),
    )


def exposed_rounds(algorithm: Algorithm, tau: int, work: Work, network: Network) -> float:
    """Seconds, a step, that the training thread waits for rounds of parameters.

    A round is hidden by the steps before it lands, but a link carries one after the other: where
    they take longer than the steps from one launch to the next, they set the pace.
    """
    fragments = algorithm.fragments
    under = min(algorithm.delay_steps(tau), tau / fragments) * work.step
    return fragments / tau * max(0.0, work.round_seconds(network, fragments) - under)


def exposed_inside(work: Work, network: Network) -> float:
    """Seconds, a step, that an island's own gradients add to it."""
    if network.island == 1 or math.isinf(network.inside):
        return 0.0
    return _exposed_under_backward(work, network.machine())


def gathering_seconds(work: Work, network: Network) -> float:
    """Seconds in which the ranks of an island put their shares together: half an all-reduce."""
    return network.machine().all_reduce_seconds(work.payload) / 2


def hiding_tau(work: Work, network: Network) -> int:
    """The smallest tau whose steps take as long as the all-reduce they are to hide."""
    return max(1, math.ceil(work.round_seconds(network) / work.step))


def hiding_delay(work: Work, network: Network, fragments: int = 1) -> int:
    """The smallest delay, in steps, under which the round of one of ``fragments`` is hidden."""
    return max(1, math.ceil(work.round_seconds(network, fragments) / work.step))


def parse_rate(text: str) -> float:
    """``"200mbit"``, ``"200 Mbit/s"``, ``"200Mbps"`` or ``"25MB/s"`` as bit/s.

    A large B means bytes, as in MB/s, except in a word of large letters alone, which may be both.

    Raises:
        ValueError: it is no rate.
    """
    found = _RATE.fullmatch(text)
    if found is None or found[3] == "BPS":
        raise ValueError(f"{text!r} is no rate; write 200mbit, 200Mbps, 1Gbit/s or 25MB/s")
    in_bytes = found[3] in ("B/s", "Bps") or found[3].lower().startswith("byte")
    rate = float(found[1]) * _THOUSANDS[found[2].lower()] * (8 if in_bytes else 1)
    if rate <= 0:
        raise ValueError(f"{text!r} is no rate: it is not above 0")
    return rate


def parse_count(text: str) -> float:
    """``"350M"``, ``"1.3B"`` or ``"124e6"`` as a number.

    Raises:
        ValueError: it is no number above 0.
    """
    found = _COUNT.fullmatch(text)
    count = float(found[1]) * _COUNTS[found[2].lower()] if found else 0.0
    if not 0 < count < math.inf:
        raise ValueError(f"{text!r} is no number above 0; write 124e6, 350M or 1.3B")
    return count


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
