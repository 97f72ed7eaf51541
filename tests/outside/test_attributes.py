"""Pins state that is neither a parameter nor a buffer: nobody sends it, so ranks compare it."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune, spectral_norm, weight_norm

import commhooks
from tests.harness import rank_outcomes, run_ranks
from tests.optimizers.warnings_of import logged_warnings
from tests.training import Form, attach, wrapped
from tests.workload import batch, initialise, plain_sgd, seeded

Change = Callable[[nn.Module, int], None]


class Codes(nn.Parameter):
    """As bitsandbytes' Params4bit: what the numbers mean is in an object that hangs on it."""

    quant_state: Any


class Quantised(nn.Module):
    """As its Linear4bit, in 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Codes(torch.zeros(7, 5, dtype=torch.uint8), requires_grad=False)
        self.load(torch.randn(7, 5, generator=seeded(8)))

    def load(self, base: Tensor) -> None:
        absmax = base.abs().amax(1, keepdim=True)
        self.weight.data.copy_((base / absmax * 127 + 128).to(torch.uint8))
        state2 = SimpleNamespace(code=torch.arange(4.0), absmax=absmax.mean())
        self.weight.quant_state = SimpleNamespace(
            absmax=absmax, shape=base.shape, dtype=base.dtype, state2=state2, module=self
        )
        self.quant_state = self.weight.quant_state

    def forward(self, x: Tensor) -> Tensor:
        state = self.weight.quant_state
        y: Tensor = x @ ((self.weight.float() - 128) / 127 * state.absmax).T
        return y


class BesideCodes(nn.Module):
    """As Linear8bitLt after a forward, and HQQ's layer: what decodes the codes is on the module."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
        self.meta = {"scale": torch.ones(3)}


@dataclass
class Scales:
    first: Tensor


class Adapted(nn.Module):
    """A frozen base of few bits, with layers that train and keep what many keep."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Quantised()
        self.head = nn.Linear(7, 3)
        self.head.scales = [{"one": torch.ones(2)}, Scales(torch.ones(2))]  # type: ignore[assignment]
        self.same = torch.arange(3)
        self.other = BesideCodes()
        initialise(self.head)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.base(x)))
        return y


def other_base(module: nn.Module, rank: int) -> None:
    """DDP sends the packed numbers, and not the scales."""
    module.get_submodule("base").load(torch.randn(7, 5, generator=seeded(8, rank)))  # type: ignore[operator]


def other_scale(module: nn.Module, rank: int) -> None:
    module.get_parameter("base.weight").quant_state.state2.absmax += rank  # type: ignore[attr-defined]


def missing_scale(module: nn.Module, rank: int) -> None:
    if rank:
        del module.get_parameter("base.weight").quant_state.state2.code  # type: ignore[attr-defined]


def beside_codes(module: nn.Module, rank: int) -> None:
    module.get_submodule("other").meta["scale"] += rank  # type: ignore[index,operator]


def in_a_list(module: nn.Module, rank: int) -> None:
    module.get_submodule("head").scales[0]["one"] += rank  # type: ignore[index]


def in_a_dataclass(module: nn.Module, rank: int) -> None:
    module.get_submodule("head").scales[1].first[0] += rank  # type: ignore[index,union-attr]


def reordered(module: nn.Module, rank: int) -> None:
    module.same = module.same.roll(rank)  # type: ignore[operator]


def register(change: Change, form: Form) -> list[str]:
    module = Adapted()
    change(module, dist.get_rank())
    model = wrapped(module)
    with logged_warnings() as texts:
        attach(commhooks.LocalSGD(tau=2), model, plain_sgd(model), form)
        torch.autograd.backward(model(batch(0, 1)[0]).sum())
    return texts


@pytest.mark.parametrize("form", ["register", "hook"])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (other_base, "base.weight.quant_state.absmax"),
        (other_scale, "base.weight.quant_state.state2.absmax"),
        (missing_scale, "base.weight.quant_state.state2.code"),
        (beside_codes, "other.meta.scale"),
    ],
)
def test_frozen_weights_that_mean_something_else_are_refused(
    change: Change, name: str, form: Form
) -> None:
    """Outputs were 0.009 apart, in a consensus that is the same on all ranks by its name."""
    for outcome in rank_outcomes(register, 3, change, form, group_timeout=600.0):
        with pytest.raises(commhooks.RegistrationError, match=f"different '{name}'.*same base"):
            raise outcome.error or AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (in_a_list, "head.scales.0.one"),
        (in_a_dataclass, "head.scales.1.first"),
        (reordered, "same"),
    ],
)
def test_what_modules_keep_is_told(change: Change, name: str) -> None:
    texts, silent = run_ranks(register, 2, change, "register")
    assert [text for text in texts if f"the ranks hold different '{name}'" in text]
    assert not silent


def unchanged(module: nn.Module, rank: int) -> None:
    pass


class Computed(nn.Module):
    """Layers that keep a weight of their own which they compute, from what DDP makes the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank())
        self.layers = nn.Sequential(
            spectral_norm(nn.Linear(5, 4)),
            weight_norm(nn.Linear(4, 4)),
            prune.random_unstructured(nn.Linear(4, 3), "weight", 0.5),  # type: ignore[no-untyped-call]
        )
        self.known = list(self.layers.parameters())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def quiet() -> list[str]:
    texts = register(unchanged, "register")
    module = Computed()
    model = DistributedDataParallel(module)
    with logged_warnings() as more:
        commhooks.LocalSGD(tau=2).register(model, *plain_sgd(model))
    return texts + more


def test_nothing_is_said_where_nothing_differs() -> None:
    assert run_ranks(quiet, 2) == [[], []]


# peft's AdaLoRA.


class RankAllocator:
    """By this name: it looks at gradients and masks rows of the adapters."""

    def __init__(self) -> None:
        self.peft_config = SimpleNamespace(total_step=20, tfinal=6, rank_pattern=None)


class AdaLora(nn.Linear):
    def __init__(self) -> None:
        super().__init__(5, 3)
        self.rankallocator = RankAllocator()


def adalora(state: commhooks.CommHookState, form: Form) -> None:
    model = wrapped(nn.Sequential(AdaLora()))
    attach(state, model, plain_sgd(model), form)
    torch.autograd.backward(model(batch(0, 1)[0]).sum())


@pytest.mark.parametrize("form", ["register", "hook"])
def test_pruning_by_local_gradients_is_refused(form: Form) -> None:
    """Ranks ended with other patterns, and saving dropped what the average had kept."""
    for warmup_steps in (0, 14):
        state = commhooks.LocalSGD(tau=2, warmup_steps=warmup_steps)
        for outcome in rank_outcomes(adalora, 2, state, form, group_timeout=600.0):
            with pytest.raises(commhooks.RegistrationError, match=r"LoRA.*warmup_steps=15"):
                raise outcome.error or AssertionError("nothing was raised")


def test_pruning_in_warm_up_is_not() -> None:
    for state in (commhooks.LocalSGD(tau=2, warmup_steps=15), commhooks.AllReduce()):
        run_ranks(adalora, 2, state, "register")
