"""torchft's LocalSGD and DiLoCo, where it is installed (`pip install torchft==0.2.0`).

It is no dependency of the recipes: it brings a server and a metrics stack of its own.
"""

import importlib
import os
import socket
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

__all__ = ["diloco", "local_sgd", "torchft_refusal"]

_TIMEOUT = timedelta(seconds=120)


def torchft_refusal() -> str | None:
    """Why torchft cannot take part here, if it cannot."""
    try:
        importlib.import_module("torchft")
    except ImportError as error:
        return f"{error} (pip install torchft==0.2.0)"
    return None


def local_sgd(
    model: DistributedDataParallel, optimizer: Optimizer, tau: int, stack: ExitStack
) -> None:
    """Average the parameters every ``tau`` steps."""
    algorithms: Any = importlib.import_module("torchft.local_sgd")
    manager = _manager(stack)
    stack.enter_context(algorithms.LocalSGD(manager, model.module, optimizer, sync_every=tau))


def diloco(
    model: DistributedDataParallel, optimizer: Optimizer, tau: int, stack: ExitStack
) -> None:
    """DiLoCo that uses a round as late as torchft allows, ``tau - 1`` steps after its launch."""
    algorithms: Any = importlib.import_module("torchft.local_sgd")
    outer = SGD(model.module.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    algorithm = algorithms.DiLoCo(
        _manager(stack),
        [model.module],
        optimizer,
        outer,
        sync_every=tau,
        fragment_sync_delay=tau - 1,
    )
    stack.enter_context(algorithm)


def _manager(stack: ExitStack) -> Any:
    """A manager for this rank, with a lighthouse on rank 0; both end with the stack."""
    torchft: Any = importlib.import_module("torchft")
    coordination: Any = importlib.import_module("torchft.coordination")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    here = _own_address()
    port = [0]
    if rank == 0:
        port[0] = _free_port()
        lighthouse = coordination.LighthouseServer(
            bind=f"[::]:{port[0]}", min_replicas=ranks, join_timeout_ms=1000, quorum_tick_ms=20
        )
        stack.callback(lighthouse.shutdown)
    dist.broadcast_object_list(port, src=0)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        here, 0, 1, is_master=True, wait_for_workers=False
    )
    manager = torchft.Manager(
        pg=_process_group(torchft),
        min_replica_size=ranks,
        load_state_dict=lambda state: None,
        state_dict=dict,
        # All start from the same parameters, and its way to send them needs a name service.
        init_sync=False,
        use_async_quorum=False,
        lighthouse_addr=f"http://{os.environ['MASTER_ADDR']}:{port[0]}",
        replica_id=f"rank{rank}",
        rank=0,
        world_size=1,
        store_addr=here,
        store_port=store.port,
        hostname=here,
        timeout=_TIMEOUT,
    )
    stack.callback(lambda: (manager.shutdown(wait=False), store))
    return manager


def _process_group(torchft: Any) -> Any:
    """torchft's gloo group on the rank's interface; its own asks the host name for an address."""

    class Gloo(torchft.ProcessGroupGloo):  # type: ignore[misc]
        def _create_pg(self, store: Any, rank: int, world_size: int) -> Any:
            options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            interface = os.environ["GLOO_SOCKET_IFNAME"]
            device = dist.ProcessGroupGloo.create_device(interface=interface)
            options._devices, options._timeout = [device], self._timeout
            backend: Any = dist.ProcessGroupGloo(store, rank, world_size, options)
            backend._set_sequence_number_for_group()
            group: Any = dist.ProcessGroup(store, rank, world_size)
            group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
            kind = dist.ProcessGroup.BackendType.GLOO
            group._register_backend(torch.device("cpu"), kind, backend)
            return group

    return Gloo(timeout=_TIMEOUT)


def _own_address() -> str:
    """This rank's address, as the way to rank 0 shows it; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], 1))
        return str(probe.getsockname()[0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
