"""Pins that the recipe of docs/precision.md makes one average over time of those of all ranks."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from tests.cases import one_case
from tests.harness import run_ranks
from tests.reference import flat
from tests.training import Trainer

PAGE = Path(__file__).parents[2] / "docs" / "precision.md"
RECIPE = re.compile(r"^@torch\.no_grad\(\)\ndef mean_over_ranks.*?^    return mean\n", re.M | re.S)
KINDS: dict[str, Any] = {
    "ema": get_ema_multi_avg_fn(0.8),  # type: ignore[no-untyped-call]
    "swa": get_swa_multi_avg_fn(),  # type: ignore[no-untyped-call]
}


def averages(kind: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """This rank's average, what the recipe makes of it, and the rank's models one by one."""
    (recipe,) = RECIPE.findall(PAGE.read_text())
    names: dict[str, Any] = {"copy": copy, "torch": torch}
    exec(recipe, names)
    trainer = Trainer(one_case("OverlapLocalSGD", 3))
    average = AveragedModel(trainer.model.module, multi_avg_fn=KINDS[kind])
    models = []
    for _ in range(7):
        models.append(trainer.step().double())
        average.update_parameters(trainer.model.module)
    mean = names["mean_over_ranks"](average)
    trainer.state.finish()
    return flat(average.parameters()), flat(mean.parameters()), models


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_the_averages_is_the_average_of_the_means(kind: str) -> None:
    ranks = run_ranks(averages, 3, kind)
    own, made, models = zip(*ranks, strict=True)
    assert not torch.equal(own[0], own[1])
    assert all(torch.equal(made[0], other) for other in made)
    expected, *later = torch.stack([torch.stack(each) for each in models]).mean(0)
    for number, mean in enumerate(later, start=2):
        weight = 0.2 if kind == "ema" else 1 / number
        expected = expected + weight * (mean - expected)
    torch.testing.assert_close(made[0].double(), expected, rtol=1e-5, atol=1e-6)
