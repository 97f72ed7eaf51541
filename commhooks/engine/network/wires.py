"""How a flat vector becomes its mean over the workers: what is sent of it, and how often."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from commhooks.engine.guards.process_exit import landing
from commhooks.engine.network.codecs import BLOCK, CODECS, Codec
from commhooks.engine.network.communicator import Communicator
from commhooks.engine.network.links import Links
from commhooks.engine.vectors.devices import chunk_numel, finiteness

__all__ = ["CompressedWire", "PlainWire", "Wire", "piece_numel", "wire_for"]


class Wire(Protocol):
    """Averages one bucket's vector.

    Attributes:
        two_shots: whether :meth:`send_back` has to be called; the vector holds the mean at the end
            of its future, else at the end of that of :meth:`launch`.
        nbytes: of what stands for the vector; a link carries 2 (m - 1) / m times as much.
    """

    two_shots: bool
    nbytes: int

    def encode(self) -> list[Tensor]:
        """Prepare what is sent.

        Returns:
            Scalars that are NaN or inf if what is sent has no meaning.
        """

    def launch(self) -> torch.futures.Future[Any]:
        """Start sending; called on the training thread."""

    def send_back(self) -> torch.futures.Future[Any]:
        """Start the second shot; called on the training thread once the first one has ended."""


class PlainWire:
    """An all-reduce of the numbers themselves.

    Args:
        peers: the workers.
        vector: what is averaged.
    """

    two_shots = False

    def __init__(self, peers: Communicator, vector: Tensor) -> None:
        self._peers = peers
        self._vector = vector
        self.nbytes = vector.numel() * vector.element_size() if peers.size > 1 else 0

    def encode(self) -> list[Tensor]:
        """The numbers are sent as they are."""
        return []

    def launch(self) -> torch.futures.Future[Any]:
        """Sum the vectors, which the workers have divided by their number."""
        return self._peers.all_reduce(self._vector)

    def send_back(self) -> torch.futures.Future[Any]:
        """There is no second shot."""
        raise NotImplementedError


def wire_for(
    links: Links, compression: str | None, vector: Tensor, *, differences: bool
) -> PlainWire | CompressedWire:
    """The wire of a vector that is averaged with the peers.

    Args:
        links: the workers.
        compression: one of the codecs; None for none.
        vector: what is averaged.
        differences: whether the workers contribute differences.
    """
    if links.back is None or compression is None:
        return PlainWire(links.peers, vector)
    codec = CODECS[compression]
    return CompressedWire(links.peers, links.back, codec, vector, differences=differences)


def piece_numel(numel: int, m: int) -> int:
    """How many numbers of a vector, in whole blocks, each of m workers owns."""
    return -(-numel // (BLOCK * m)) * BLOCK


class CompressedWire:
    """Differences in few bits, with error feedback, in two shots.

    All workers share a reference r, the last mean. Worker i sends Q(d_i) of d_i = c_i + e_i - r,
    piece by piece to the pieces' owners, and keeps e_i <- d_i - Q(d_i). An owner adds its own
    residual E to the mean of those, in the vector's format, and sends Q of the sum to all; so all
    workers hold the same bits of r <- r + Q. What is rounded off is sent later: nothing is lost
    (error feedback, Karimireddy et al., ICML 2019; two shots as in DoubleSqueeze, Tang et al., ICML
    2019).

    Args:
        forth: the workers; the first shot goes there.
        back: the same; the second shot, whose start is up to each worker's training thread.
        codec: rounds to few bits.
        vector: what is averaged; c_i before a round, and the mean after it.
        differences: whether the workers contribute differences, for which r is zero.

    Attributes:
        e: this worker's residual.
        E: that of the piece that it owns.
        r: the reference; None where it is zero.
    """

    two_shots = True

    def __init__(
        self,
        forth: Communicator,
        back: Communicator,
        codec: Codec,
        vector: Tensor,
        *,
        differences: bool,
    ) -> None:
        self._forth, self._back, self._codec = forth, back, codec
        m, dtype, device = forth.size, vector.dtype, vector.device
        numel, piece = vector.numel(), piece_numel(vector.numel(), m)
        blocks = piece // BLOCK
        scales = blocks * dtype.itemsize if codec.scaled else 0
        self.nbytes = m * (scales + blocks * codec.width)
        self._sent, self._received, self._gathered = (
            torch.zeros(m, self.nbytes // m, dtype=torch.uint8, device=device) for _ in range(3)
        )
        self._mine = torch.zeros(1, self.nbytes // m, dtype=torch.uint8, device=device)
        self._sent_scales = self._sent[:, :scales].view(dtype)
        # In whole blocks; what lies beyond the vector stays zero.
        residuals = torch.zeros(m * piece, dtype=dtype, device=device)
        self.e = residuals[:numel]
        self.E = torch.zeros(piece, dtype=dtype, device=device)
        self.r = None if differences else torch.zeros_like(self.e)
        limit = chunk_numel(device) or 2 * piece
        step = max(1, min(blocks, limit // 2 // BLOCK))

        def coded(rows: Tensor, row: int, first: int, last: int) -> _Coded:
            return _Coded(rows[row], dtype, scales, codec, first, last)

        self._chunks = []
        self._owned = []
        for first in range(0, blocks, step):
            last = min(first + step, blocks)
            begin, end = first * BLOCK, last * BLOCK
            received = [coded(self._received, row, first, last) for row in range(m)]
            mine = coded(self._mine, 0, first, last)
            self._owned.append((self.E[begin:end].view(-1, BLOCK), received, mine))
            for owner in range(m):
                start, stop = owner * piece + begin, min(owner * piece + end, numel)
                if start < stop:
                    self._chunks.append(
                        _Chunk(
                            vector[start:stop],
                            None if self.r is None else self.r[start:stop],
                            residuals[start : owner * piece + end].view(-1, BLOCK),
                            coded(self._sent, owner, first, last),
                            coded(self._gathered, owner, first, last),
                        )
                    )

    def restart(self) -> None:
        """Begin anew with nothing left over; r is the caller's to set."""
        self.e.zero_()
        self.E.zero_()

    def encode(self) -> list[Tensor]:
        """Q(d) and e."""
        with torch.no_grad(), record_function("commhooks::encode"):
            for chunk in self._chunks:
                d = chunk.e.view(-1)[: len(chunk.vector)].add_(chunk.vector)
                if chunk.r is not None:
                    d.sub_(chunk.r)
                chunk.sent.write(chunk.e, _room_like(chunk.e))
            return [finiteness(self._sent_scales if self._codec.scaled else self.e)]

    def launch(self) -> torch.futures.Future[Any]:
        """Send each piece to its owner, who then sums what it got."""
        sent = self._forth.all_to_all(self._received, self._sent)
        return sent.then(landing(self._sum))

    def send_back(self) -> torch.futures.Future[Any]:
        """Send the piece that this worker owns to all, who then have the mean."""
        arrived = self._back.all_gather(self._gathered, self._mine)
        return arrived.then(landing(self._decode))

    def _sum(self, received: torch.futures.Future[Any]) -> Tensor:
        """Runs on the backend's thread when all pieces have come."""
        received.value()
        with torch.no_grad(), record_function("commhooks::sum"):
            for residual, pieces, mine in self._owned:
                t = _room_like(residual)
                for piece in pieces:
                    piece.read(t)
                    residual.add_(t, alpha=1.0 / self._forth.size)
                mine.write(residual, t)
        return self._mine

    def _decode(self, gathered: torch.futures.Future[Any]) -> Tensor:
        """Runs on the backend's thread when the means have come."""
        gathered.value()
        with torch.no_grad(), record_function("commhooks::decode"):
            for chunk in self._chunks:
                t = _room_like(chunk.e)
                chunk.gathered.read(t)
                q = t.view(-1)[: len(chunk.vector)]
                if chunk.r is None:
                    chunk.vector.copy_(q)
                else:
                    chunk.vector.copy_(chunk.r.add_(q))
        return self._gathered


class _Rooms(threading.local):
    """Room to compute a chunk in; every thread has its own, for all wires."""

    def __init__(self) -> None:
        self.of: dict[tuple[torch.dtype, torch.device], Tensor] = {}


_rooms = _Rooms()


def _room_like(blocks: Tensor) -> Tensor:
    """Room of the shape of ``blocks``, which the next call gives again."""
    kind = blocks.dtype, blocks.device
    room = _rooms.of.get(kind)
    if room is None or room.numel() < blocks.numel():
        room = _rooms.of[kind] = torch.empty(blocks.numel(), dtype=kind[0], device=kind[1])
    return room[: blocks.numel()].view(blocks.shape)


class _Coded:
    """The scales and codes of some blocks, in a row of all of a piece's scales and codes."""

    def __init__(
        self, row: Tensor, dtype: torch.dtype, scales: int, codec: Codec, first: int, last: int
    ) -> None:
        size = dtype.itemsize if codec.scaled else 0
        self._codec = codec
        self._scales = row[first * size : last * size].view(dtype).view(-1, 1)
        begin, end = scales + first * codec.width, scales + last * codec.width
        self._codes = row[begin:end].view(-1, codec.width)

    def write(self, d: Tensor, t: Tensor) -> None:
        self._codec.encode(d, t, self._scales, self._codes)

    def read(self, t: Tensor) -> None:
        self._codec.decode(t, self._scales, self._codes)


@dataclass(frozen=True)
class _Chunk:
    """A cache-sized stretch of the vector, and what goes with it."""

    vector: Tensor
    r: Tensor | None
    e: Tensor
    sent: _Coded
    gathered: _Coded
