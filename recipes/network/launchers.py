"""How the same command becomes the command of one machine among several."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["Place", "command_of", "environment_of", "name_of", "places"]

# Takes the options of accelerate launch.
_START = Path(__file__).resolve().parents[1] / "start.py"


@dataclass(frozen=True)
class Place:
    """Where a rank is, and where it meets the others.

    Attributes:
        rank: number of the rank.
        ranks: how many there are.
        per_node: how many of them share a machine.
        address: rank 0's address.
        port: where rank 0 can listen.
        interface: through which the rank reaches the others.
    """

    rank: int
    ranks: int
    address: str
    port: int
    interface: str
    per_node: int = 1

    @property
    def node(self) -> int:
        """Number of the rank's machine."""
        return self.rank // self.per_node

    @property
    def nodes(self) -> int:
        """How many machines there are."""
        return self.ranks // self.per_node


def places(place: Place, words: Sequence[str]) -> list[Place]:
    """Those at which the command is started: one a rank, or one a machine if it is a launcher's."""
    each = place.per_node if _is_launcher(words) else 1
    return [replace(place, rank=rank) for rank in range(0, place.ranks, each)]


def name_of(place: Place, words: Sequence[str]) -> str:
    """What to call the process that is started there."""
    if place.per_node > 1 and _is_launcher(words):
        return f"machine {place.node}"
    return f"rank {place.rank}"


def command_of(place: Place, words: Sequence[str]) -> list[str]:
    """The rank's own form of a command.

    ``{rank}``, ``{ranks}``, ``{address}``, ``{port}`` and ``{interface}`` are filled in, wherever
    they stand. ``accelerate launch`` is told its machine by options, since it reads no environment;
    options of the same names that were given for a single machine are dropped.
    """
    fields = {"{" + name + "}": str(value) for name, value in vars(place).items()}
    filled = []
    for word in words:
        for field, value in fields.items():
            word = word.replace(field, value)
        filled.append(word)
    start = _accelerate_options(filled)
    if start is None:
        return filled
    options = {
        "--num_machines": place.nodes,
        "--num_processes": place.ranks,
        "--machine_rank": place.node,
        "--main_process_ip": place.address,
        "--main_process_port": place.port,
    }
    flags = [str(word) for option in options.items() for word in option]
    return [*filled[:start], *flags, *_without(filled[start:], options)]


def environment_of(place: Place, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables by which a rank finds the others.

    A script that calls ``init_process_group`` reads RANK and the like, ``torchrun`` reads PET_*;
    both therefore need no options at all.
    """
    cores = (os.cpu_count() or 1) // place.ranks
    rendezvous = {
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.ranks),
        "LOCAL_RANK": str(place.rank % place.per_node),
        "LOCAL_WORLD_SIZE": str(place.per_node),
        "PET_MASTER_ADDR": place.address,
        "PET_MASTER_PORT": str(place.port),
        "PET_NNODES": str(place.nodes),
        "PET_NODE_RANK": str(place.node),
        "PET_NPROC_PER_NODE": str(place.per_node),
        "GLOO_SOCKET_IFNAME": place.interface,
        "NCCL_SOCKET_IFNAME": place.interface,
        "TP_SOCKET_IFNAME": place.interface,
    }
    gpus = _gpus(environment)
    if gpus:
        # One a rank, and those of its machine alone, or none at all.
        first = place.node * place.per_node
        own = gpus[first : first + place.per_node] if len(gpus) >= place.ranks else []
        rendezvous["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    defaults = {
        # More threads than cores slow all of them down; PyTorch would start one a core and rank.
        "OMP_NUM_THREADS": str(max(1, cores)),
        # There is no name service on this network, about which torch would warn at every launch.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return {**defaults, **environment, **rendezvous}


def _gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that a process would find here, as CUDA_VISIBLE_DEVICES names them."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    found = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number, _ in enumerate(found.iterdir())] if found.is_dir() else []


def _is_launcher(words: Sequence[str]) -> bool:
    names = {Path(word).name for word in words}
    return _accelerate_options(words) is not None or bool(
        names & {"torchrun", "torch.distributed.run"}
    )


def _accelerate_options(words: Sequence[str]) -> int | None:
    """Where the options of ``accelerate launch`` begin, if that is the command."""
    for at, word in enumerate(words[:-1]):
        if Path(word).name == "accelerate" and words[at + 1] == "launch":
            return at + 2
        accelerate = Path(word).name == "accelerate-launch" or word == "accelerate.commands.launch"
        if accelerate or Path(word).resolve() == _START:
            return at + 1
    return None


def _without(words: Sequence[str], names: Mapping[str, object]) -> list[str]:
    """``words`` without the options ``names``, up to the script, whose options are its own."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word.endswith(".py") or word == "--module":
            kept.append(word)
            break
        name, equals, _ = word.partition("=")
        if name.replace("-", "_").replace("__", "--", 1) in names:
            if not equals:
                next(rest, None)
        else:
            kept.append(word)
    return [*kept, *rest]
