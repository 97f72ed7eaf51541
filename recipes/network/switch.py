"""Ranks on a switch: a veth pair from each rank's namespace to a bridge, shaped where it leaves."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from network.namespace import Namespace, run

__all__ = ["INTERFACE", "Port", "build_switch", "change_rate", "sent_bytes"]

# The name of every rank's interface, in its own namespace.
INTERFACE = "link0"
_BRIDGE = "switch"
_SUBNET = "10.0.0.{}"


@dataclass(frozen=True)
class Port:
    """One rank's end of its link.

    Attributes:
        namespace: where the rank runs.
        address: the rank's IPv4 address.
    """

    namespace: Namespace
    address: str


def build_switch(ranks: int, rate: str | None) -> list[Port]:
    """Join ``ranks`` new namespaces through a bridge in the present one.

    Args:
        ranks: number of them.
        rate: what each rank can send, as ``tc`` writes it (``200mbit``); None for no limit.
            Receiving is limited by what the others send.

    Raises:
        RuntimeError: ``ip`` or ``tc`` failed, for instance on a rate it does not understand.
    """
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", _BRIDGE, "type", "bridge")
    run("ip", "link", "set", _BRIDGE, "up")
    return [_connect(rank, rate) for rank in range(ranks)]


def change_rate(ports: Sequence[Port], rate: str) -> None:
    """Let every rank send at another rate from now on; only where there is a limit already.

    The queues stay, with what waits in them and the bytes that they have counted.

    Raises:
        RuntimeError: ``tc`` does not understand the rate.
    """
    for port in ports:
        with port.namespace.entered():
            run("tc", "qdisc", "change", "dev", INTERFACE, "root", *_queue(rate))


def sent_bytes(interface: str = INTERFACE) -> int:
    """Bytes that have left an interface of the present namespace, headers of every packet included.

    Read from the interface's queue: unlike the interface itself, it counts the headers of each of
    the packets into which a large segment is cut on its way to the wire.
    """
    queues = json.loads(run("tc", "-s", "-j", "qdisc", "show", "dev", interface))
    return sum(int(queue["bytes"]) for queue in queues if queue.get("root"))


def _connect(rank: int, rate: str | None) -> Port:
    namespace, port, address = Namespace(), f"port{rank}", _SUBNET.format(rank + 1)
    far_end = ("peer", "name", INTERFACE, "netns", str(namespace.path))
    run("ip", "link", "add", port, "type", "veth", *far_end)
    run("ip", "link", "set", port, "master", _BRIDGE, "up")
    with namespace.entered():
        run("ip", "address", "add", f"{address}/24", "dev", INTERFACE)
        run("ip", "link", "set", INTERFACE, "up")
        run("tc", "qdisc", "add", "dev", INTERFACE, "root", *_queue(rate))
    return Port(namespace, address)


def _queue(rate: str | None) -> tuple[str, ...]:
    if rate is None:
        # The default queue of a veth keeps no count.
        return ("pfifo", "limit", "10000")
    # The burst is what an idle link sends at once: two of the largest segments, which at 50 Mbit/s
    # is 20 ms worth. The latency bounds the queue; TCP keeps far below it.
    return ("tbf", "rate", rate, "burst", "128kb", "latency", "400ms")
