"""Pins that DDP's packing of gradients into buckets is repeated as torch does it."""

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from commhooks.engine.ready_order import pack

DTYPES = (torch.float32, torch.float64, torch.bfloat16)

tensors = st.lists(
    st.builds(
        lambda numel, dtype: torch.empty(numel, dtype=dtype),
        st.integers(1, 60),
        st.sampled_from(DTYPES),
    ),
    min_size=1,
    max_size=20,
)


@given(tensors, st.lists(st.integers(1, 300), min_size=1, max_size=3), st.randoms())
def test_the_buckets_are_those_of_torch(
    parameters: list[torch.Tensor], limits: list[int], chance: object
) -> None:
    order = list(range(len(parameters)))
    chance.shuffle(order)  # type: ignore[attr-defined]
    expected, _ = dist._compute_bucket_assignment_by_size(  # type: ignore[attr-defined]
        [parameters[number] for number in order], limits, [False] * len(order), order
    )
    assert sorted(pack(parameters, order, limits)) == sorted(expected)
