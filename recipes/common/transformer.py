"""A small decoder-only transformer over bytes (Vaswani et al. 2017; pre-norm as in GPT-2)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["VOCABULARY", "ByteTransformer", "generate"]

VOCABULARY = 256


class Block(nn.Module):
    """Causal attention, then a two-layer perceptron, each beside a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        # (batch, length, 3 width) to three of (batch, heads, length, width / heads)
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class ByteTransformer(nn.Module):
    """Logits of the next byte after each: (batch, length) to (batch, length, 256)."""

    def __init__(self, *, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.context = context
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        self.apply(_initialise)

    def forward(self, text: Tensor) -> Tensor:
        positions = torch.arange(text.shape[1], device=text.device)
        x = self.bytes(text.long()) + self.positions(positions)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def _initialise(module: nn.Module) -> None:
    """As GPT-2: small weights, so that the first guess is close to uniform."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


@torch.no_grad()
def generate(model: ByteTransformer, prompt: bytes, length: int, temperature: float) -> bytes:
    """``length`` bytes that the model has go on from a prompt of at least one byte.

    Args:
        model: in the mode it is in.
        prompt: what to go on from.
        length: how many bytes.
        temperature: 1 draws from what the model says; less is more cautious.
    """
    device = model.head.weight.device
    text = torch.tensor([list(prompt)], device=device)
    for _ in range(length):
        logits = model(text[:, -model.context :])[:, -1].float()
        byte = torch.multinomial((logits / temperature).softmax(dim=1), 1)
        text = torch.cat([text, byte], dim=1)
    return bytes(text[0, len(prompt) :].tolist())
