"""Pins changes to a registered run: unfrozen and replaced parameters, hyper-parameters, loading."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import commhooks
from tests.cases import ALGORITHMS, Case, with_tau
from tests.expected import assert_follows, reference_trajectory
from tests.harness import run_ranks
from tests.optimizers.warnings_of import logged_warnings
from tests.training import Form, Trainer, make_state
from tests.workload import plain_sgd, ragged_model

# Parameters that train and are not averaged.


def partly_frozen(dtype: torch.dtype) -> nn.Module:
    model = ragged_model(dtype)
    model.get_submodule("0").requires_grad_(False)
    return model


def unfreeze(trainer: Trainer) -> None:
    """As gradual unfreezing does it, in the middle of a run."""
    layer = trainer.model.module.get_submodule("0").requires_grad_(True)
    (optimizer,) = trainer.optimizers
    optimizer.add_param_group({"params": list(layer.parameters())})


def unfreeze_for_a_new_optimizer(trainer: Trainer) -> None:
    layer = trainer.model.module.get_submodule("0").requires_grad_(True)
    trainer.optimizers = [*trainer.optimizers, SGD(layer.parameters(), lr=0.05)]


def unfreeze_on_one_rank(trainer: Trainer) -> None:
    if trainer.rank == 1:
        unfreeze(trainer)


def assign(trainer: Trainer) -> None:
    """The module's parameters are other objects from here on, and so are those that train."""
    values = {name: p.detach().clone() for name, p in trainer.model.module.named_parameters()}
    trainer.model.module.load_state_dict(values, assign=True)
    for p in trainer.model.module.parameters():
        p.requires_grad_(True)
    trainer.optimizers = plain_sgd(trainer.model.module)


Change = Callable[[Trainer], None]
CHANGES: Sequence[tuple[Change, bool]] = [
    (unfreeze, True),
    (unfreeze_for_a_new_optimizer, True),
    (unfreeze_on_one_rank, True),
    (assign, False),
]


def enter(trainer: Trainer) -> None:
    with trainer.state.averaged():
        pass


def finish(trainer: Trainer) -> None:
    trainer.state.finish()


def train(trainer: Trainer) -> None:
    """Up to the next boundary, with a gradient for what DDP does not know of."""
    for _ in range(4):
        for name, p in trainer.model.module.named_parameters():
            if name.startswith("0.") and p.requires_grad and p.grad is None:
                p.grad = torch.full_like(p, 0.1 + trainer.rank)
        trainer.step()


def left_behind(uses: Sequence[Change], form: Form) -> None:
    for algorithm in ("LocalSGD", "OverlapLocalSGD"):
        for change, frozen in CHANGES:
            # Of replaced parameters DDP itself says at the second forward that it knows none.
            for use in uses if frozen else [use for use in uses if use is not train]:
                model = partly_frozen if frozen else ragged_model
                case = Case(algorithm, {"tau": 2}, model=model, optimizers=plain_sgd)
                trainer = Trainer(case, form)
                for _ in range(3):
                    trainer.step()
                change(trainer)
                with pytest.raises(commhooks.RoundError, match=r"0\.weight"):
                    use(trainer)
                dist.barrier()


@pytest.mark.parametrize("form", ["register", "hook"])
def test_parameters_that_train_and_are_not_averaged(form: Form) -> None:
    """Named on every rank, also where one rank alone trains them."""
    run_ranks(left_behind, 2, [enter, finish, train], form, timeout=40.0)


# Parameters that no longer train.


def freeze(trainer: Trainer) -> None:
    trainer.model.module.get_submodule("0").requires_grad_(False)
    for p in trainer.model.module.get_submodule("0").parameters():
        p.grad = None


def freezing_sgd(model: nn.Module) -> Sequence[Optimizer]:
    """Built after DDP has wrapped the model and before the state is registered."""
    getattr(model, "module", model).get_submodule("0").requires_grad_(False)
    return plain_sgd(model)


def frozen_later(cases: Sequence[Case], form: Form) -> None:
    for case in cases:
        # In the bare form what is frozen before the first forward does not take part.
        for steps in (0, 1, 3) if form == "register" else (1, 3):
            trainer = Trainer(case, form)
            for _ in range(steps):
                trainer.step()
            freeze(trainer)
            trainer.step()
            enter(trainer)
            saved = [trainer.model.state_dict(), trainer.state.state_dict()]
            saved = [{k: _copied(v) for k, v in each.items()} for each in saved]
            again = Trainer(case)
            again.steps = trainer.steps
            freeze(again)
            again.model.load_state_dict(saved[0])
            again.state.load_state_dict(saved[1])
            for _ in range(5):
                where = f"{case}: frozen after {steps}, step {again.steps + 1}"
                assert torch.equal(again.step(), trainer.step()), where
            trainer.state.finish()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("form", ["register", "hook"])
def test_parameters_frozen_after_ddp_has_wrapped_them(form: Form) -> None:
    """A checkpoint looked for each of them in the buckets of gradients."""
    ddp = {"find_unused_parameters": True}
    cases = [
        Case(name, {"tau": 2}, optimizers=optimizers, ddp=ddp, warmup_steps=warmup_steps)
        for name, optimizers in (
            ("LocalSGD", plain_sgd),
            ("OverlapLocalSGD", plain_sgd),
            ("OverlapLocalSGD", freezing_sgd),
        )
        for warmup_steps in (0, 3)
    ]
    run_ranks(frozen_later, 2, cases, form)


# Hyper-parameters.


def set_later(cases: Sequence[Case]) -> list[list[Tensor]]:
    runs = []
    for case in cases:
        state = make_state(case)
        names = ["bucket_cap_mb", *state.hyperparameters()]
        for name in names:
            setattr(state, name, getattr(state, name))  # not registered yet
        trainer = Trainer(case, state=state)
        for name in names:
            value = getattr(state, name)
            with pytest.raises(commhooks.RegistrationError, match=name):
                setattr(state, name, 2)
            assert getattr(state, name) == value
        runs.append([trainer.step() for _ in range(case.steps)])
    return runs


def test_hyper_parameters_are_set_before_registration() -> None:
    """``state.tau = 2`` was taken and ignored, since the rounds had read it."""
    cases = [
        Case(name, arguments, steps=4) for name in ALGORITHMS for arguments in with_tau(name, 3)
    ]
    for case, *real in zip(cases, *run_ranks(set_later, 2, cases), strict=True):
        assert_follows(case, real, reference_trajectory(case, 2))


# Loading.


def loaded_inside(form: Form) -> None:
    for algorithm in ("LocalSGD", "OverlapLocalSGD", "AllReduce"):
        arguments = {} if algorithm == "AllReduce" else {"tau": 2}
        trainer = Trainer(Case(algorithm, arguments), form)
        for _ in range(3):
            trainer.step()
        for model in (trainer.model, trainer.model.module):
            before = trainer.x
            with trainer.state.averaged():
                inside = trainer.x
                zeros = {name: torch.zeros_like(p) for name, p in model.state_dict().items()}
                with pytest.raises(commhooks.RegistrationError, match="averaged"):
                    model.load_state_dict(zeros)
                assert torch.equal(trainer.x, inside)
            assert torch.equal(trainer.x, before)
        trainer.model.load_state_dict(trainer.model.state_dict())  # outside it is allowed
        trainer.state.finish()


@pytest.mark.parametrize("form", ["register", "hook"])
def test_a_model_loaded_inside_averaged_is_refused(form: Form) -> None:
    """It was undone at the end of the block without a word."""
    run_ranks(loaded_inside, 2, form)


def warnings_after_loading(case: Case, form: Form) -> dict[str, int]:
    """How many warnings speak of loading, by what followed the model's loading."""
    counts = {}
    for follow in ("nothing", "the state", "finish"):
        trainer = Trainer(case, form)
        for _ in range(4):
            trainer.step()
        saved = trainer.state.state_dict()
        model = {name: p.clone() for name, p in trainer.model.state_dict().items()}
        trainer.step()
        with logged_warnings() as texts:
            trainer.model.load_state_dict(model)
            if follow == "the state":
                trainer.state.load_state_dict(saved)
            elif follow == "finish":
                trainer.state.finish()
            for _ in range(6):
                trainer.step()
        counts[follow] = len([text for text in texts if "load_state_dict" in text])
    return counts


@pytest.mark.parametrize("form", ["register", "hook"])
def test_a_model_loaded_in_mid_run_without_its_state_is_warned_about(form: Form) -> None:
    """The next boundary pulls it back to the anchor of before."""
    for algorithm in ("OverlapLocalSGD", "EASGD"):
        case = Case(algorithm, {"tau": 2})
        for counts in run_ranks(warnings_after_loading, 2, case, form):
            assert counts == {"nothing": 1, "the state": 0, "finish": 0}
