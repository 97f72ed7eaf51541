"""Pins every bit of trajectories over all algorithms, forms, islands and wires."""

import pytest
import torch

from tests.golden import bits

CAPABILITY = torch.backends.cpu.get_cpu_capability()


@pytest.mark.skipif(CAPABILITY == "DEFAULT", reason="without fused multiply-add, torch rounds more")
@pytest.mark.parametrize(("form", "wire"), bits.GROUPS)
def test_every_bit_is_as_recorded(form: str, wire: str | None) -> None:
    assert bits.measure(form, wire) == bits.recorded(form, wire)
