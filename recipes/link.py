"""Run any command that launches ranks over a network of a chosen speed, on this one machine.

    python recipes/link.py --rate 200mbit --ranks 2 -- \\
        python recipes/start.py recipes/vision.py --algorithm overlap-local-sgd --scale-lr

Every rank runs the command in a network namespace of its own, as if on a machine of its own; what
it sends is held to the rate. With --per-node several ranks share a machine and its link. A rate can
change in the middle of a run: --rate 200mbit,50mbit@60,1gbit@120 goes down to 50 Mbit/s after a
minute, and up to 1 Gbit/s after two.

recipes/start.py, `accelerate launch` and `torchrun` are told their place among the machines, as is
a script that calls `init_process_group` itself; for anything else write {rank}, {ranks}, {address},
{port} and {interface} where they belong.

Works as root, and as an ordinary user where the kernel allows user namespaces. Where neither works
the command runs unshaped. Rank 0 writes to the terminal; the others are heard when they fail.
Whatever ends the run, no process, namespace or interface is left of it.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import tyro

from network import sandbox
from network.launchers import Place, command_of, environment_of, name_of, places
from network.rates import UNSHAPED, Change, Course, parse_rates
from network.supervisor import Supervisor
from network.switch import INTERFACE, Port, build_switch, change_rate, sent_bytes

_PORT = 29500
# Longer than the supervisor takes to end ranks by force.
_PATIENCE_S = 30.0
# How the tool calls itself within its sandbox: the number of a pipe that closes when it is to end.
_LIFELINE = "COMMHOOKS_LINK_LIFELINE"


@dataclass(frozen=True)
class Link:
    """The network, and who is on it."""

    ranks: int = 2
    """Ranks in all."""
    per_node: int = 1
    """Ranks of one machine, which share its link and reach one another without it."""
    rate: Annotated[str, tyro.conf.arg(metavar="RATE[,RATE@SECONDS,...]")] = "200mbit"
    """What each machine can send, as tc writes it: 1gbit, 200mbit, 50mbit; or unshaped. And what it
    can send from so many seconds after the start on."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """File to write the bytes to that each machine has sent."""
    strict: tyro.conf.FlagCreatePairsOff[bool] = False
    """Fail where the network cannot be shaped, in place of running unshaped."""

    @property
    def shape(self) -> str | None:
        """The rate at the start, None for no limit."""
        first, _ = parse_rates(self.rate)
        return None if first == UNSHAPED else first

    @property
    def changes(self) -> tuple[Change, ...]:
        """The rates that follow."""
        return parse_rates(self.rate)[1]


def run_inside(link: Link, words: Sequence[str], lifeline: int) -> int:
    """Within the sandbox: build the network, run the ranks, count what they sent."""
    ports = build_switch(link.ranks // link.per_node, link.shape)
    _try_out(link, ports)
    supervisor = Supervisor()
    try:
        first = Place(0, link.ranks, ports[0].address, _PORT, INTERFACE, link.per_node)
        for place in places(first, words):
            inside = ports[place.node].namespace.entered()
            _start(supervisor, place, words, inside)
        course = Course(link.changes, lambda change: _change(ports, change))

        def cancelled() -> bool:
            course.keep_up()
            # Readable means closed, since nobody writes: whoever started this has ended.
            return bool(select.select([lifeline], [], [], 0)[0])

        status = supervisor.wait(cancelled)
    finally:
        supervisor.stop()
    sent = []
    for port in ports:
        with port.namespace.entered():
            sent.append(sent_bytes())
    _report(link, sent)
    return status


def run_sandboxed(link: Link, words: Sequence[str]) -> int:
    """Run this tool again inside a sandbox, and see it out."""
    reader, writer = os.pipe()
    options = ["--ranks", str(link.ranks), "--rate", link.rate, "--per-node", str(link.per_node)]
    if link.json is not None:
        options += ["--json", str(link.json)]
    itself = [sys.executable, str(Path(__file__).resolve()), *options]
    process = subprocess.Popen(
        sandbox.command(*itself, "--", *words),
        env={**os.environ, _LIFELINE: str(reader)},
        pass_fds=[reader],
        # Ctrl-C reaches this process alone, which then closes the pipe.
        start_new_session=True,
    )
    os.close(reader)
    try:
        return process.wait()
    finally:
        os.close(writer)
        try:
            process.wait(_PATIENCE_S)
        finally:
            # Takes all that is left in the sandbox along.
            process.kill()
            process.wait()


def run_unshaped(link: Link, words: Sequence[str]) -> int:
    """Run the ranks on the loopback, each with a launcher of its own all the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    supervisor = Supervisor()
    try:
        for place in places(Place(0, link.ranks, "127.0.0.1", port, "lo", link.per_node), words):
            _start(supervisor, place, words, nullcontext())
        return supervisor.wait(lambda: False)
    finally:
        supervisor.stop()


def _start(
    supervisor: Supervisor,
    place: Place,
    words: Sequence[str],
    inside: AbstractContextManager[None],
) -> None:
    environment = environment_of(place, os.environ)
    supervisor.start(command_of(place, words), environment, inside, name_of(place, words))


def _try_out(link: Link, ports: Sequence[Port]) -> None:
    """Find out now, and not in the middle of the run, whether tc understands every rate."""
    for change in link.changes:
        change_rate(ports[:1], change.rate)
    if link.changes and link.shape is not None:
        change_rate(ports[:1], link.shape)


def _change(ports: Sequence[Port], change: Change) -> None:
    change_rate(ports, change.rate)
    sys.stderr.write(f"link: {change.rate} from now on, {change.seconds:g} s after the start\n")


def _report(link: Link, sent: list[int]) -> None:
    amounts = ", ".join(f"{count / 1e6:,.1f}" for count in sent)
    sys.stderr.write(f"link: {link.rate}, {link.ranks} ranks; MB sent by each machine: {amounts}\n")
    if link.json is not None:
        record = {"rate": link.rate, "ranks": link.ranks, "bytes_sent": sent}
        link.json.write_text(json.dumps(record) + "\n")


def main(arguments: Sequence[str]) -> int:
    """Run the command behind ``--``; the status of the first rank that failed, or 0."""
    own, words = list(arguments), list[str]()
    if "--" in own:
        split = own.index("--")
        own, words = own[:split], own[split + 1 :]
    link = tyro.cli(Link, description=__doc__, args=own)
    try:
        parse_rates(link.rate)
    except ValueError as error:
        sys.stderr.write(f"link: {error}\n")
        return 2
    if link.per_node < 1 or link.ranks % link.per_node:
        sys.stderr.write(f"link: --per-node {link.per_node} does not divide --ranks {link.ranks}\n")
        return 2
    if not words:
        sys.stderr.write("link: no command; write it behind --\n")
        return 2
    try:
        if (lifeline := os.environ.pop(_LIFELINE, None)) is not None:
            return run_inside(link, words, int(lifeline))
        signal.signal(signal.SIGTERM, _leave)
        reason = sandbox.refusal()
        if reason is None:
            return run_sandboxed(link, words)
        sys.stderr.write(f"link: cannot shape a network here ({reason})\n")
        if link.strict:
            return 1
        sys.stderr.write("link: running unshaped\n")
        return run_unshaped(link, words)
    except (OSError, RuntimeError) as error:
        sys.stderr.write(f"link: {error}\n")
        return 1


def _leave(number: int, frame: FrameType | None) -> None:
    # An exception, so that cleaning up gets its turn.
    raise SystemExit(128 + number)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
    sys.exit(130)
