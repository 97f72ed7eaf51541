"""Rounding with error feedback, in two shots: whole vectors, one piece of blocks after another."""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 256
LEVELS = {"int8": 127, "int4": 7}


def rounded(vector: Tensor, kind: str) -> Tensor:
    """Q: bf16, or multiples of each block's largest number / levels.

    The mean of two multiples often lies halfway between two others. So that such a tie goes the
    library's way, products and sums are formed in its order.
    """
    if kind == "bf16":
        return vector.bfloat16().to(vector.dtype)
    blocks = torch.nn.functional.pad(vector, (0, -len(vector) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) * (1.0 / LEVELS[kind])
    steps = torch.where(scale > 0, blocks * scale.reciprocal(), 0).round()
    return (steps * scale).view(-1)[: len(vector)]


class Compressed:
    """A mean over m workers whose numbers go rounded to the owners of pieces, and back."""

    def __init__(self, kind: str, reference: Tensor | None) -> None:
        self.kind = kind
        self.r = reference
        self.e: list[Tensor] = []
        self.owned: Tensor | None = None

    def __call__(self, contributions: Sequence[Tensor]) -> Tensor:
        """r + Q(mean Q(c_i - r + e_i) + E), which is the next r."""
        m, first = len(contributions), contributions[0]
        if m == 1:
            return first
        if self.owned is None:
            self.e = [torch.zeros_like(first) for _ in contributions]
            self.owned = torch.zeros_like(first)
        r = torch.zeros_like(first) if self.r is None else self.r
        d = [c + e - r for c, e in zip(contributions, self.e, strict=True)]
        sent = [rounded(each, self.kind) for each in d]
        self.e = [each - q for each, q in zip(d, sent, strict=True)]
        # Pieces are whole blocks, so that cutting them changes no block.
        to_send_back = self.owned
        for each in sent:
            to_send_back = to_send_back + each * (1.0 / m)
        back = rounded(to_send_back, self.kind)
        self.owned = to_send_back - back
        result = r + back
        if self.r is not None:
            self.r = result
        return result
