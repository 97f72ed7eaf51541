"""Rounding without error feedback, to show what the feedback is for."""

from torch import Tensor

from commhooks.engine.network.codecs import CODECS, Codec

__all__ = ["NAME"]

NAME = "int4-without-feedback"


class _WithoutFeedback:
    """Another codec that forgets what it rounds off, so that no later round sends it."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.scaled = codec.scaled
        self.width = codec.width

    def encode(self, d: Tensor, t: Tensor, scales: Tensor, codes: Tensor) -> None:
        self._codec.encode(d, t, scales, codes)
        d.zero_()

    def decode(self, t: Tensor, scales: Tensor, codes: Tensor) -> None:
        self._codec.decode(t, scales, codes)


# The library knows the codecs of this table, and nobody but an experiment would want another.
CODECS[NAME] = _WithoutFeedback(CODECS["int4"])
