"""How a flat vector becomes its mean over the workers: what is sent of it, and how often."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from commhooks.engine.guards.process_exit import landing
from commhooks.engine.network.codecs import BLOCK, Codec
from commhooks.engine.network.communicator import Communicator
from commhooks.engine.vectors.devices import chunk_numel, finiteness

__all__ = ["CompressedWire", "PlainWire", "Wire", "piece_numel"]


class Wire(Protocol):
    """Averages one bucket's vector.

    Attributes:
        two_shots: whether :meth:`send_back` has to be called; the vector holds the mean at the end
            of its future, else at the end of that of :meth:`launch`.
        nbytes: of what stands for the vector; a link carries 2 (m - 1) / m times as much.
    """

    two_shots: bool
    nbytes: int

    def encode(self, vector: Tensor) -> list[Tensor]:
        """Prepare what is sent.

        Returns:
            Scalars that are NaN or inf if what is sent has no meaning.
        """

    def launch(self, vector: Tensor) -> torch.futures.Future[Any]:
        """Start sending; called on the training thread."""

    def send_back(self, vector: Tensor) -> torch.futures.Future[Any]:
        """Start the second shot; called on the training thread once the first one has ended."""


class PlainWire:
    """An all-reduce of the numbers themselves.

    Args:
        peers: the workers.
        numel: length of the vector.
        dtype: its format.
    """

    two_shots = False

    def __init__(self, peers: Communicator, numel: int, dtype: torch.dtype) -> None:
        self._peers = peers
        self.nbytes = numel * dtype.itemsize if peers.size > 1 else 0

    def encode(self, vector: Tensor) -> list[Tensor]:
        """The numbers are sent as they are."""
        return []

    def launch(self, vector: Tensor) -> torch.futures.Future[Any]:
        """Sum the vectors, which the workers have divided by their number."""
        return self._peers.all_reduce(vector)

    def send_back(self, vector: Tensor) -> torch.futures.Future[Any]:
        """There is no second shot."""
        raise NotImplementedError


def piece_numel(numel: int, m: int) -> int:
    """How many numbers of a vector, in whole blocks, each of m workers owns."""
    return -(-numel // (BLOCK * m)) * BLOCK


class CompressedWire:
    """Differences in few bits, with error feedback, in two shots.

    All workers share a reference r, the last mean. Worker i sends Q(d_i) of d_i = c_i - r + e_i,
    piece by piece to the pieces' owners, and keeps e_i <- d_i - Q(d_i). An owner adds its own
    residual E to the mean of those, in the vector's format, and sends Q of the sum to all; so all
    workers hold the same bits of r <- r + Q. What is rounded off is sent later: nothing is lost
    (error feedback, Karimireddy et al., ICML 2019; two shots as in DoubleSqueeze, Tang et al., ICML
    2019).

    Args:
        forth: the workers; the first shot goes there.
        back: the same; the second shot, whose start is up to each worker's training thread.
        codec: rounds to few bits.
        like: a vector of the wire's length and format, on its device.
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
        like: Tensor,
        *,
        differences: bool,
    ) -> None:
        self._forth, self._back, self._codec = forth, back, codec
        m, numel, dtype, device = forth.size, like.numel(), like.dtype, like.device
        self._piece = piece_numel(numel, m)
        self._blocks = self._piece // BLOCK
        self._dtype = dtype
        row = self._blocks * (codec.width + (dtype.itemsize if codec.scaled else 0))
        self.nbytes = m * row
        self._sent, self._received, self._gathered = (
            torch.zeros(m, row, dtype=torch.uint8, device=device) for _ in range(3)
        )
        self._mine = torch.zeros(row, dtype=torch.uint8, device=device)
        self.e = torch.zeros(numel, dtype=dtype, device=device)
        self.r = None if differences else torch.zeros_like(self.e)
        self.E = torch.zeros(self._piece, dtype=dtype, device=device)
        limit = chunk_numel(device)
        self._chunk = self._blocks if limit is None else min(self._blocks, limit // BLOCK // 2)
        # Of the training thread, and of the backend's, which may work at the same time.
        self._rooms = torch.zeros(2, 2, self._chunk * BLOCK, dtype=dtype, device=device)

    def restart(self) -> None:
        """Begin anew with nothing left over; r is the caller's to set."""
        self.e.zero_()
        self.E.zero_()

    def encode(self, vector: Tensor) -> list[Tensor]:
        """Q(d) and e."""
        probes = []
        d_room, t_room = self._rooms[0]
        with torch.no_grad(), record_function("commhooks::encode"):
            for owner, first, last in self._chunks():
                begin, end = self._stretch(owner, first, last)
                size = end - begin
                d, t = (room[: (last - first) * BLOCK] for room in (d_room, t_room))
                d[size:].zero_()
                e = self.e[begin:end]
                torch.add(vector[begin:end], e, out=d[:size])
                if self.r is not None:
                    d[:size].sub_(self.r[begin:end])
                self._encode(d, t, self._sent[owner], first, last)
                e.copy_(d[:size])
                probes.append(finiteness(d))
        return probes

    def launch(self, vector: Tensor) -> torch.futures.Future[Any]:
        """Send each piece to its owner, who then sums what it got."""
        sent = self._forth.all_to_all(self._received, self._sent)
        return sent.then(landing(self._sum))

    def send_back(self, vector: Tensor) -> torch.futures.Future[Any]:
        """Send the piece that this worker owns to all, who then have the mean."""
        arrived = self._back.all_gather(self._gathered, self._mine)

        def decode(gathered: torch.futures.Future[Any]) -> Tensor:
            gathered.value()
            self._decode_into(vector)
            return vector

        return arrived.then(landing(decode))

    def _sum(self, received: torch.futures.Future[Any]) -> Tensor:
        """Runs on the backend's thread when all pieces have come."""
        received.value()
        d_room, t_room = self._rooms[1]
        with torch.no_grad(), record_function("commhooks::sum"):
            for first in range(0, self._blocks, self._chunk):
                last = min(first + self._chunk, self._blocks)
                d, t = (room[: (last - first) * BLOCK] for room in (d_room, t_room))
                residual = self.E[first * BLOCK : last * BLOCK]
                d.copy_(residual)
                for row in self._received:
                    self._decode(t, row, first, last)
                    d.add_(t, alpha=1.0 / self._forth.size)
                self._encode(d, t, self._mine, first, last)
                residual.copy_(d)
        return self._mine

    def _decode_into(self, vector: Tensor) -> None:
        _, t_room = self._rooms[1]
        with torch.no_grad(), record_function("commhooks::decode"):
            for owner, first, last in self._chunks():
                begin, end = self._stretch(owner, first, last)
                t = t_room[: (last - first) * BLOCK]
                self._decode(t, self._gathered[owner], first, last)
                if self.r is None:
                    vector[begin:end].copy_(t[: end - begin])
                else:
                    self.r[begin:end].add_(t[: end - begin])
                    vector[begin:end].copy_(self.r[begin:end])

    def _chunks(self) -> Iterator[tuple[int, int, int]]:
        """Owner, first block of its piece and last one, for every chunk with numbers in it."""
        for owner in range(self._forth.size):
            for first in range(0, self._blocks, self._chunk):
                if owner * self._piece + first * BLOCK < self.e.numel():
                    yield owner, first, min(first + self._chunk, self._blocks)

    def _stretch(self, owner: int, first: int, last: int) -> tuple[int, int]:
        begin = owner * self._piece + first * BLOCK
        return begin, min(begin + (last - first) * BLOCK, self.e.numel())

    def _views(self, row: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The scales and the codes of some blocks in a row."""
        width, size = self._codec.width, self._dtype.itemsize if self._codec.scaled else 0
        begin = self._blocks * size
        scales = row[first * size : last * size].view(self._dtype).view(-1, 1)
        codes = row[begin + first * width : begin + last * width].view(-1, width)
        return scales, codes

    def _encode(self, d: Tensor, t: Tensor, row: Tensor, first: int, last: int) -> None:
        scales, codes = self._views(row, first, last)
        self._codec.encode(d.view(-1, BLOCK), t.view(-1, BLOCK), scales, codes)

    def _decode(self, t: Tensor, row: Tensor, first: int, last: int) -> None:
        scales, codes = self._views(row, first, last)
        self._codec.decode(t.view(-1, BLOCK), scales, codes)
