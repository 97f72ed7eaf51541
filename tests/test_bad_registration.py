"""Pins that a registration that cannot work is refused at once, saying what to do instead."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

import commhooks
from tests.harness import rank_outcomes, run_ranks
from tests.workload import gradient, ragged_model

Misuse = Callable[[], object]


def a_model() -> DistributedDataParallel:
    return DistributedDataParallel(ragged_model())


def an_optimizer(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1)


def not_ddp() -> None:
    module = ragged_model()
    commhooks.LocalSGD(tau=2).register(module, an_optimizer(module))


def not_even_a_module() -> None:
    model = a_model()
    commhooks.LocalSGD(tau=2).register("model", an_optimizer(model))  # type: ignore[arg-type]


def no_optimizer() -> None:
    commhooks.LocalSGD(tau=2).register(a_model())


def not_an_optimizer() -> None:
    model = a_model()
    commhooks.LocalSGD(tau=2).register(model, model.parameters())


def a_scaler_for_an_optimizer() -> None:
    model = a_model()
    commhooks.LocalSGD(tau=2).register(model, an_optimizer(model), torch.amp.GradScaler("cpu"))


def not_a_scaler() -> None:
    model = a_model()
    commhooks.LocalSGD(tau=2).register(model, an_optimizer(model), scaler=1024.0)  # type: ignore[arg-type]


def a_foreign_optimizer() -> None:
    commhooks.LocalSGD(tau=2).register(a_model(), an_optimizer(ragged_model()))


def one_foreign_optimizer_of_two() -> None:
    model = a_model()
    commhooks.LocalSGD(tau=2).register(model, an_optimizer(model), an_optimizer(ragged_model()))


class NeverInitialised(Optimizer):
    """Like torch's own PostLocalSGDOptimizer: an Optimizer that fires no hooks."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.inner.step()


def an_optimizer_without_hooks() -> None:
    model = a_model()
    commhooks.LocalSGD(tau=2).register(model, NeverInitialised(an_optimizer(model)))


def the_same_state_twice() -> None:
    state = commhooks.LocalSGD(tau=2)
    model = a_model()
    state.register(model, an_optimizer(model))
    state.register(model, an_optimizer(model))


def the_same_state_for_another_model() -> None:
    state = commhooks.LocalSGD(tau=2)
    for model in (a_model(), a_model()):
        state.register(model, an_optimizer(model))


def a_second_state_for_one_model() -> None:
    model = a_model()
    for state in (commhooks.LocalSGD(tau=2), commhooks.EASGD(tau=2)):
        state.register(model, an_optimizer(model))


def after_a_built_in_hook() -> None:
    model: Any = a_model()
    model._register_builtin_comm_hook(torch._C._distributed_c10d.BuiltinCommHookType.FP16_COMPRESS)
    commhooks.LocalSGD(tau=2).register(model, an_optimizer(model))


def after_the_bare_form() -> None:
    model, state = a_model(), commhooks.LocalSGD(tau=2)
    model.register_comm_hook(state, commhooks.comm_hook)
    state.register(model, an_optimizer(model))


def the_same_state_bare_on_two_models() -> None:
    state = commhooks.LocalSGD(tau=2)
    for _ in range(2):
        model = a_model()
        model.register_comm_hook(state, commhooks.comm_hook)
        gradient(model, dist.get_rank(), 1)


def sparse_gradients() -> None:
    model = DistributedDataParallel(nn.Embedding(10, 3, sparse=True))
    commhooks.LocalSGD(tau=2).register(model, an_optimizer(model))


def sparse_gradients_in_the_bare_form() -> None:
    model = DistributedDataParallel(nn.Embedding(10, 3, sparse=True))
    model.register_comm_hook(commhooks.LocalSGD(tau=2), commhooks.comm_hook)
    torch.autograd.backward(model(torch.tensor([1, 2])).sum())


def delayed(names: Sequence[str]) -> DistributedDataParallel:
    """Parameters whose gradients DDP averages by itself, in a hook on another parameter."""
    module = ragged_model()
    parameters = dict(module.named_parameters())
    module.register_parameter("frozen", nn.Parameter(torch.zeros(2), requires_grad=False))
    return DistributedDataParallel(
        module,
        delay_all_reduce_named_params=[(name, parameters[name]) for name in names],
        param_to_hook_all_reduce=parameters["0.weight"],
    )


def some_delayed() -> None:
    model = delayed(["2.weight", "2.bias"])
    commhooks.LocalSGD(tau=2).register(model, an_optimizer(model))


def all_delayed() -> None:
    model = delayed(["0.weight", "0.bias", "2.weight", "2.bias"])
    commhooks.LocalSGD(tau=2).register(model, an_optimizer(model))


def some_delayed_in_the_bare_form() -> None:
    model = delayed(["2.weight"])
    model.register_comm_hook(commhooks.OverlapLocalSGD(tau=2), commhooks.comm_hook)
    gradient(model, dist.get_rank(), 1)


def another_group_than_the_models() -> None:
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    model = DistributedDataParallel(ragged_model(), process_group=alone)
    commhooks.LocalSGD(tau=2, process_group=dist.group.WORLD).register(model, an_optimizer(model))


class Managed(dist.ProcessGroup):
    """As torchft has them: a group that torch.distributed has not made."""

    def __init__(self) -> None:
        super().__init__(0, 1)  # type: ignore[call-arg]


def a_foreign_group() -> None:
    model = a_model()
    commhooks.LocalSGD(tau=2, process_group=Managed()).register(model, an_optimizer(model))


def a_foreign_island() -> None:
    model = a_model()
    commhooks.LocalSGD(tau=2, island=Managed()).register(model, an_optimizer(model))


def the_factor_of_a_foreign_group() -> None:
    assert commhooks.LocalSGD(tau=2, process_group=Managed()).lr_factor


def over_a_foreign_group() -> DistributedDataParallel:
    model = a_model()
    model.process_group = Managed()
    return model


def a_model_over_a_foreign_group() -> None:
    model = over_a_foreign_group()
    commhooks.LocalSGD(tau=2).register(model, an_optimizer(model))


def a_model_over_a_foreign_group_in_the_bare_form() -> None:
    model = over_a_foreign_group()
    model.register_comm_hook(commhooks.LocalSGD(tau=2), commhooks.comm_hook)
    gradient(model, dist.get_rank(), 1)


def a_group_that_has_been_destroyed() -> None:
    group = dist.new_group()
    model = a_model()
    state = commhooks.LocalSGD(tau=2, process_group=group)
    dist.destroy_process_group(group)
    state.register(model, an_optimizer(model))


def an_optimizer_by_keyword() -> None:
    model = a_model()
    register: Any = commhooks.LocalSGD(tau=2).register
    register(model, optimizer=an_optimizer(model))


def register_called_on_the_class() -> None:
    model = a_model()
    register: Any = commhooks.OverlapLocalSGD.register
    register(model, an_optimizer(model))


def in_the_bare_form(state: object) -> None:
    model = a_model()
    model.register_comm_hook(state, commhooks.comm_hook)
    gradient(model, dist.get_rank(), 1)


def none_in_the_bare_form() -> None:
    in_the_bare_form(None)


def a_class_in_the_bare_form() -> None:
    in_the_bare_form(commhooks.LocalSGD)


def something_else_in_the_bare_form() -> None:
    in_the_bare_form({"tau": 8})


THE_RIGHT_CALL = r"state\.register\(ddp_model, optimizer\)"

A_LASTING_GROUP = r"Managed \(tests\..*use a group of init_process_group"

REFUSALS: list[tuple[Misuse, str]] = [
    (not_ddp, "wrap.*DistributedDataParallel"),
    (not_even_a_module, "DistributedDataParallel"),
    (no_optimizer, THE_RIGHT_CALL),
    (an_optimizer_by_keyword, THE_RIGHT_CALL),
    (register_called_on_the_class, THE_RIGHT_CALL),
    (none_in_the_bare_form, "was given None.*" + THE_RIGHT_CALL),
    (a_class_in_the_bare_form, "was given the class LocalSGD.*" + THE_RIGHT_CALL),
    (something_else_in_the_bare_form, "was given {'tau': 8}.*" + THE_RIGHT_CALL),
    (not_an_optimizer, r"torch\.optim\.Optimizer"),
    (a_scaler_for_an_optimizer, "scaler=scaler"),
    (not_a_scaler, r"torch\.amp\.GradScaler"),
    (a_foreign_optimizer, r"build it from ddp_model\.parameters\(\)"),
    (one_foreign_optimizer_of_two, r"build it from ddp_model\.parameters\(\)"),
    (an_optimizer_without_hooks, "pass the optimizer it wraps"),
    (the_same_state_twice, "build one state for every"),
    (the_same_state_for_another_model, "build one state for every"),
    (a_second_state_for_one_model, "already"),
    (after_a_built_in_hook, "already"),
    (after_the_bare_form, "already"),
    (the_same_state_bare_on_two_models, "build one state for every"),
    (sparse_gradients, "sparse=False"),
    (sparse_gradients_in_the_bare_form, "sparse=False"),
    (a_foreign_group, A_LASTING_GROUP),
    (a_foreign_island, A_LASTING_GROUP),
    (the_factor_of_a_foreign_group, A_LASTING_GROUP),
    (a_model_over_a_foreign_group, A_LASTING_GROUP),
    (a_model_over_a_foreign_group_in_the_bare_form, A_LASTING_GROUP),
    (a_group_that_has_been_destroyed, "ProcessGroup .*has been destroyed"),
    (some_delayed, "Leave delay_all_reduce_named_params and.*out"),
    (all_delayed, "Leave delay_all_reduce_named_params and.*out"),
    (some_delayed_in_the_bare_form, "Leave delay_all_reduce_named_params and.*out"),
    (another_group_than_the_models, r"process_group=ddp_model\.process_group"),
]


@pytest.mark.parametrize(
    ("misuse", "message"), REFUSALS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_misuse_is_refused_on_every_rank(misuse: Misuse, message: str) -> None:
    for outcome in rank_outcomes(misuse, 2, group_timeout=600.0):
        with pytest.raises(commhooks.RegistrationError, match=message):
            raise outcome.error or AssertionError("nothing was raised")


def without_a_group() -> None:
    commhooks.LocalSGD(tau=2).register(ragged_model(), an_optimizer(ragged_model()))


def test_no_process_group() -> None:
    (outcome,) = rank_outcomes(without_a_group, 1, initialise=False)
    with pytest.raises(commhooks.RegistrationError, match="init_process_group"):
        raise outcome.error or AssertionError("nothing was raised")


def trains_after_a_refusal() -> list[float]:
    """A refused registration has changed nothing: the same model and state register afterwards."""
    model, state = a_model(), commhooks.LocalSGD(tau=1)
    optimizer = an_optimizer(model)
    before = copy.deepcopy(list(model.parameters()))
    with pytest.raises(commhooks.RegistrationError):
        state.register(model, an_optimizer(ragged_model()))
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    state.register(model, optimizer)
    gradient(model, dist.get_rank(), 1)
    optimizer.step()
    return [p.sum().item() for p in model.parameters()]


def test_a_refused_registration_changes_nothing() -> None:
    first, second = run_ranks(trains_after_a_refusal, 2)
    assert first == second


def refused_on_a_subgroup() -> str:
    """Rank 1 builds no model, so nothing may wait for it."""
    group = dist.new_group([0])
    if dist.get_rank():
        return ""
    model = DistributedDataParallel(ragged_model(), process_group=group)
    commhooks.LocalSGD(tau=2).register(model, an_optimizer(model))
    with pytest.raises(commhooks.RegistrationError) as caught:
        commhooks.LocalSGD(tau=2).register(model, an_optimizer(model))
    return str(caught.value)


def test_a_refusal_concerns_the_models_own_ranks_alone() -> None:
    message, _ = run_ranks(refused_on_a_subgroup, 2, group_timeout=600.0)
    assert "has a communication hook already" in message
