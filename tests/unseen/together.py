"""What the ranks have, held against one another."""

import torch
import torch.distributed as dist
from torch import Tensor


def everyones(mine: Tensor) -> list[Tensor]:
    """Every rank's copy of a tensor, in the order of the ranks."""
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine.contiguous())
    return found


def gap(mine: Tensor) -> float:
    """How far two ranks are apart in any number."""
    stacked = torch.stack(everyones(mine))
    return float((stacked.max(dim=0).values - stacked.min(dim=0).values).max())


def mean(mine: Tensor) -> Tensor:
    return torch.stack(everyones(mine)).mean(dim=0)
