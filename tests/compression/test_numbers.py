"""Numbers that rounding could trip over: defined, or refused on every rank."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import commhooks
from commhooks.engine.network.codecs import BLOCK, CODECS, Codec
from tests.harness import run_ranks
from tests.reference import flat
from tests.training import wrapped

KINDS = ("bf16", "int8", "int4")


def coded(codec: Codec, values: Tensor) -> tuple[Tensor, Tensor]:
    """What comes out for ``values``, and what is left over."""
    d, t = values.clone(), torch.empty_like(values)
    scales = torch.zeros(len(values) if codec.scaled else 0, 1, dtype=values.dtype)
    codes = torch.zeros(len(values), codec.width, dtype=torch.uint8)
    codec.encode(d, t, scales, codes)
    out = torch.empty_like(values)
    codec.decode(out, scales, codes)
    return out, d


def of_one(value: float) -> Tensor:
    """Blocks of ordinary numbers with one extraordinary number."""
    values = torch.randn(3, BLOCK, generator=torch.Generator().manual_seed(1))
    values[1, 7] = value
    return values


@dataclass
class Numbers:
    """A tensor with a name."""

    name: str
    make: Callable[[], Tensor]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "numbers",
    [
        Numbers("ordinary", lambda: of_one(0.5)),
        Numbers("zeros", lambda: torch.zeros(2, BLOCK)),
        Numbers("enormous", lambda: of_one(3e38)),
        Numbers("denormal", lambda: torch.full((2, BLOCK), 1e-42)),
        Numbers("one denormal", lambda: of_one(0.5) * 0 + torch.eye(3, BLOCK) * 1e-40),
        Numbers("negative", lambda: -of_one(1e4).abs()),
    ],
    ids=lambda numbers: numbers.name,
)
def test_what_is_sent_and_what_is_left_make_the_whole(
    kind: str, dtype: torch.dtype, numbers: Numbers
) -> None:
    codec, values = CODECS[kind], numbers.make().to(dtype)
    out, left = coded(codec, values)
    assert torch.isfinite(out).all()
    scale = values.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(out + left, values, rtol=1e-6, atol=float(scale.max()) * 2e-7)
    step = {"bf16": 1 / 128, "int8": 1 / 127, "int4": 1 / 7}[kind]
    # Half a step of the block's, or what lies below the smallest normal number.
    assert (left.abs() <= 0.5001 * step * scale + torch.finfo(torch.float32).tiny).all()


def test_int4_tells_all_its_numbers_apart() -> None:
    values = torch.arange(-7.0, 8.0).repeat(18)[:BLOCK].view(1, BLOCK)
    out, left = coded(CODECS["int4"], values)
    torch.testing.assert_close(out, values, rtol=1e-6, atol=0)
    assert left.abs().max() < 1e-5


def run_with(bad: float | None, kind: str) -> tuple[str, Tensor, Tensor]:
    """Two rounds; before the second, one rank's parameter becomes what it should not be."""
    model = wrapped(nn.Linear(300, 3), bucket_cap_mb=25.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state: Any = commhooks.LocalSGD(tau=2, compression=kind)  # type: ignore[arg-type]
    state.register(model, optimizer)
    before = after = torch.zeros(0)
    try:
        for step in range(4):
            model(torch.ones(2, 300)).mean().backward()
            if step == 3 and dist.get_rank() == 1 and bad is not None:
                with torch.no_grad():
                    next(model.parameters())[0, 5] = bad
            before = flat(list(model.parameters())).clone()
            # The optimizer moves nothing here, so that the models can be compared.
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()
            optimizer.zero_grad()
    except commhooks.RoundError as error:
        after = flat(list(model.parameters())).clone()
        return str(error), before, after
    return "", before, after


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_are_refused_on_every_rank(kind: str) -> None:
    for bad in (float("nan"), float("inf")):
        for message, before, after in run_ranks(run_with, 2, bad, kind):
            assert "rank(s) [1] hold NaN or inf" in message
            torch.testing.assert_close(before, after, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_one_enormous_number(kind: str) -> None:
    """The block that it is in loses its small ones to the residual; the run goes on."""
    for message, _, _ in run_ranks(run_with, 2, 1e30, kind):
        assert message == ""


def complex_run(kind: str) -> Tensor:
    module = nn.ParameterList(
        [
            nn.Parameter(torch.ones(40, 10, dtype=torch.complex64)),
            nn.Parameter(torch.ones(7, dtype=torch.float64)),
        ]
    )

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = module

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = (self.weights[0].abs() * x).sum() + (self.weights[1] * x).sum()
            return y

    model = wrapped(Net(), bucket_cap_mb=25.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = commhooks.LocalSGD(tau=2, compression=kind)  # type: ignore[arg-type]
    state.register(model, optimizer)
    for step in range(40):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 if step < 6 else 0.0
        model(torch.tensor(0.1 * (1 + dist.get_rank()))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return flat([torch.view_as_real(p) if p.is_complex() else p for p in model.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_complex_and_double_parameters(kind: str) -> None:
    first, second = run_ranks(complex_run, 2, kind)
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
