"""A model with a buffer of every kind, and what each rank puts into it."""

import torch
from torch import Tensor, nn

from tests.workload import initialise, seeded


class OwnNorm(nn.Module):
    """A normalisation layer that is not torch's, as many models bring one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3, dtype=dtype))
        self.register_buffer("running_var", torch.ones(3, dtype=dtype))
        self.register_buffer("momentum_queue", torch.zeros(2, 2))


class Holder(nn.Module):
    """One layer that trains; everything else is there for its buffers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.norms = nn.ModuleDict(
            {
                "batch": nn.BatchNorm1d(3, affine=False),
                "instance": nn.InstanceNorm1d(3, track_running_stats=True),
                "own": OwnNorm(torch.float32),
                "in_half": OwnNorm(torch.bfloat16),
            }
        )
        for name, value in content(0).items():
            if "." not in name:
                # What DDP itself cannot broadcast when it is built comes in later, see `fill`.
                value = value if _dense(value) else torch.zeros(1)
                self.register_buffer(name, value.clone(), persistent="cache" not in name)
        self.register_buffer("nothing", None)
        self.register_buffer("tied", self.get_buffer("queue"))
        self._ddp_params_and_buffers_to_ignore = ["ignored"]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def holder(dtype: torch.dtype = torch.float32) -> nn.Module:
    return initialise(Holder())


def content(rank: int) -> dict[str, Tensor]:
    """What ``rank`` puts into every buffer, by name."""
    random = seeded(3, rank)
    r = float(rank)
    return {
        # Statistics.
        "norms.batch.running_mean": torch.randn(3, generator=random),
        "norms.batch.running_var": torch.rand(3, generator=random) + 0.5,
        "norms.instance.running_mean": torch.randn(3, generator=random),
        "norms.instance.running_var": torch.rand(3, generator=random) + 0.5,
        "norms.own.running_mean": torch.randn(3, generator=random),
        "norms.own.running_var": torch.rand(3, generator=random) + 0.5,
        "norms.in_half.running_mean": torch.randn(3, generator=random).bfloat16(),
        "norms.in_half.running_var": (torch.rand(3, generator=random) + 0.5).bfloat16(),
        # Constants, the same on every rank.
        "seven": torch.tensor(7.0),
        "large": torch.tensor([16776704.0]),
        "rotary": 10_000.0 ** (-torch.arange(0, 16, 2) / 16),
        "rotary_cache": torch.outer(torch.arange(4.0), 10_000.0 ** (-torch.arange(3) / 3)).cos(),
        "half_constant": torch.tensor([1.1, 3.3]).bfloat16(),
        # A rank's own while it trains.
        "mask": torch.tensor([1.0, 0.0, 1.0, 0.0]).roll(rank),
        "queue": nn.functional.normalize(torch.randn(4, 3, generator=random), dim=1),
        "norms.own.momentum_queue": torch.randn(2, 2, generator=random),
        "bits": torch.tensor([float("nan"), -0.0, float("-inf"), r]),
        "ema": torch.tensor(0.1 + r, dtype=torch.float64),
        "fp16": torch.tensor([0.1 + r, 0.2]).half(),
        "phases": torch.polar(torch.ones(3), torch.arange(3.0) + r),
        "turned": torch.randn(3, 2, generator=random).T,
        "empty": torch.zeros(0, 3),
        "norms.batch.num_batches_tracked": torch.tensor(5 + rank),
        "counts": torch.arange(3, dtype=torch.int32) + rank,
        "flag": torch.tensor(rank == 0),
        "bytes": torch.arange(5, dtype=torch.uint8) + rank,
        "cache": torch.arange(4.0) + rank,
        # A rank's own for ever.
        "grown_cache": torch.arange(4.0 + rank),
        "coo": torch.eye(2).mul(1 + r).to_sparse(),
        "csr": torch.eye(3).mul(1 + r).to_sparse_csr(),
        "expanded": torch.tensor([1.0 + r]).expand(3),
        "ignored": torch.tensor([r, r]),
    }


def averaged(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def own(name: str) -> bool:
    """Whether the consensus leaves the buffer as this rank has it."""
    return name in ("grown_cache", "coo", "csr", "expanded", "ignored")


def consensus(rank: int, size: int) -> dict[str, Tensor]:
    """What ``rank`` must see in the consensus model of ``size`` ranks."""
    ranks = [content(each) for each in range(size)]
    return {
        name: torch.stack([each[name].double() for each in ranks]).mean(0).to(mine.dtype)
        if averaged(name)
        else (mine if own(name) else ranks[0][name])
        for name, mine in ranks[rank].items()
    }


def fill(module: nn.Module, rank: int) -> None:
    """Give every buffer its content; one that has grown or is not dense is replaced."""
    for name, value in content(rank).items():
        held = module.get_buffer(name)
        if held.shape == value.shape and _dense(value):
            held.copy_(value)
        else:
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, value)


def spoil(module: nn.Module) -> None:
    """Overwrite what the consensus may have written, as a forward in training mode does."""
    for name in content(0):
        if not own(name):
            module.get_buffer(name).fill_(1)


def held(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers that `content` knows."""
    return {name: module.get_buffer(name).clone() for name in content(0)}


def assert_holds(module: nn.Module, expected: dict[str, Tensor], where: str) -> None:
    """Statistics to the last digits, everything else bit for bit."""
    for name, value in expected.items():
        mine = module.get_buffer(name)
        if averaged(name) and where != "put back":
            tolerance = 1e-2 if mine.dtype == torch.bfloat16 else 1e-6
            assert (mine - value).abs().max().item() <= tolerance, f"{where}: {name}: {mine}"
        else:
            assert same_bits(mine, value), f"{where}: {name}: {mine}, not {value}"
    assert module.get_buffer("tied") is module.get_buffer("queue"), where


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, NaN and the sign of zero included."""
    if a.layout != torch.strided:
        a, b = a.to_dense(), b.to_dense()
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def _dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and 0 not in tensor.stride()
