"""Pins what is said of DDP's modes and wrappers in which a state cannot have DDP's hook."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision
from torch.optim import SGD

import commhooks
from tests.harness import run_ranks
from tests.training import wrapped
from tests.workload import gradient, ragged_model

Refused = Callable[[], object]


def register(model: nn.Module) -> None:
    commhooks.LocalSGD(tau=2).register(model, SGD(model.parameters(), lr=0.1))


def run_bare(model: Any) -> None:
    model.register_comm_hook(commhooks.LocalSGD(tau=2), commhooks.comm_hook)
    gradient(model, dist.get_rank(), 1)


def by_the_python_reducer() -> DistributedDataParallel:
    torch._dynamo.config.optimize_ddp = "python_reducer"
    model = wrapped(ragged_model())
    # It counts when the model is built.
    torch._dynamo.config.optimize_ddp = True
    return model


def python_reducer() -> None:
    register(by_the_python_reducer())


def python_reducer_bare() -> None:
    run_bare(by_the_python_reducer())


def python_reducer_bare_by_its_method() -> None:
    model: Any = by_the_python_reducer()
    model.register_comm_hook(commhooks.LocalSGD(tau=2), commhooks.comm_hook)
    model.forward(torch.ones(4, 5)).sum().backward()


def compiled_with_the_python_reducer() -> None:
    register(torch.compile(by_the_python_reducer(), backend="eager"))  # type: ignore[arg-type]


def replicated() -> None:
    register(replicate(ragged_model()))


def replicated_after_its_first_forward() -> None:
    model = replicate(ragged_model())
    gradient(model, dist.get_rank(), 1)
    register(model)


def replicated_bare() -> None:
    run_bare(replicate(ragged_model()))


def replicated_bare_by_keyword() -> None:
    model: Any = replicate(ragged_model())
    model.register_comm_hook(state=commhooks.LocalSGD(tau=2), hook=commhooks.comm_hook)
    gradient(model, dist.get_rank(), 1)


def replicated_bare_after_its_first_forward() -> None:
    model = replicate(ragged_model())
    gradient(model, dist.get_rank(), 1)
    run_bare(model)


def a_part_that_is_replicated() -> None:
    model = ragged_model()
    part: Any = replicate(model[0])  # type: ignore[index]
    part.register_comm_hook(commhooks.LocalSGD(tau=2), commhooks.comm_hook)
    gradient(model, dist.get_rank(), 1)


def with_optimizers_in_the_backward() -> nn.Module:
    module = ragged_model()
    _apply_optimizer_in_backward(SGD, module.parameters(), {"lr": 0.1})
    return module


def optimizers_in_the_backward() -> None:
    register(wrapped(with_optimizers_in_the_backward()))


def optimizers_in_the_backward_bare() -> None:
    run_bare(wrapped(with_optimizers_in_the_backward()))


def optimizers_in_the_backward_afterwards() -> None:
    model = wrapped(ragged_model())
    register(model)
    _apply_optimizer_in_backward(SGD, model.module.parameters(), {"lr": 0.1})
    gradient(model, dist.get_rank(), 1)


def mixed_precision() -> None:
    register(wrapped(ragged_model(), mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16)))


NOT_THE_PYTHON_REDUCER = r'optimize_ddp = "python_reducer".*Set it to True'
NOT_REPLICATE = r"_composable\.replicate.*ddp_model = DistributedDataParallel\(module\)"
AFTER_THE_BACKWARD = "_apply_optimizer_in_backward.*stepped after the backward"

REFUSALS: list[tuple[str, Sequence[Refused]]] = [
    (
        NOT_THE_PYTHON_REDUCER,
        (
            python_reducer,
            python_reducer_bare,
            python_reducer_bare_by_its_method,
            compiled_with_the_python_reducer,
        ),
    ),
    (
        NOT_REPLICATE,
        (
            replicated,
            replicated_after_its_first_forward,
            replicated_bare,
            replicated_bare_by_keyword,
            replicated_bare_after_its_first_forward,
            a_part_that_is_replicated,
        ),
    ),
    (
        AFTER_THE_BACKWARD,
        (
            optimizers_in_the_backward,
            optimizers_in_the_backward_bare,
            optimizers_in_the_backward_afterwards,
        ),
    ),
    (r"mixed_precision=.*torch\.autocast", (mixed_precision,)),
]


@pytest.mark.parametrize(
    ("words", "all_refused"), REFUSALS, ids=["python", "replicate", "in", "mixed"]
)
def test_it_is_said_what_to_do_instead(words: str, all_refused: Sequence[Refused]) -> None:
    # torch keeps models of the Python reducer for good, and so the threads of their group.
    tidy = words != NOT_THE_PYTHON_REDUCER
    run_ranks(raise_all, 2, all_refused, words, group_timeout=600.0, tidy=tidy)


def raise_all(all_refused: Sequence[Refused], words: str) -> None:
    for refused in all_refused:
        with pytest.raises(commhooks.RegistrationError, match=words):
            refused()
