"""Pins that a Join context which leaves the state out is refused by name, instead of hanging.

DDP shadows only its own all-reduces: a rank that is out of batches misses the state's rounds.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch.distributed.algorithms.join import Join

import commhooks
from tests.cases import Case
from tests.harness import run_ranks
from tests.training import Form, Trainer

MakeContext = Callable[[Trainer], AbstractContextManager[object]]


def of_the_model(trainer: Trainer) -> AbstractContextManager[object]:
    return trainer.model.join()  # type: ignore[no-any-return]


def of_the_model_alone(trainer: Trainer) -> AbstractContextManager[object]:
    return Join([trainer.model])


def without_an_early_end(trainer: Trainer) -> AbstractContextManager[object]:
    """What Accelerate's ``join_uneven_inputs([ddp_model])`` opens, on GPUs alone."""
    return Join([trainer.model], throw_on_early_termination=False)


CONTEXTS = [of_the_model, of_the_model_alone, without_an_early_end]
CASES = [
    Case("LocalSGD", {"tau": 2}),
    Case("OverlapLocalSGD", {"tau": 2}),
    Case("EASGD", {"tau": 2}, warmup_steps=5),
]


NAMES_THE_FORM = r"Join\(\[state, ddp_model\]\)"


def train_within(context: AbstractContextManager[object], trainer: Trainer) -> None:
    with context:
        with torch.no_grad():  # an evaluation is nothing that others wait for
            trainer.model(torch.zeros(1, 5))
        for _ in range(3 + trainer.rank):
            trainer.step()


def uneven(form: Form, first_steps: int) -> None:
    """Ranks with other numbers of batches; the first training forward is one too many."""
    for case in CASES:
        for make in CONTEXTS:
            trainer = Trainer(case, form)
            for _ in range(first_steps):
                trainer.step()
            x, step = trainer.x, trainer.state.stats.step
            with pytest.raises(commhooks.RegistrationError, match=NAMES_THE_FORM):
                train_within(make(trainer), trainer)
            assert torch.equal(trainer.x, x)
            assert trainer.state.stats.step == step
            trainer.state.finish()


@pytest.mark.parametrize(("form", "first_steps"), [("register", 0), ("register", 3), ("hook", 3)])
def test_a_join_that_leaves_the_state_out_is_refused(form: Form, first_steps: int) -> None:
    run_ranks(uneven, 2, form, first_steps, group_timeout=600.0, timeout=20.0)


def switched_off() -> None:
    """What Accelerate opens where batches are made even; nothing is shadowed, nothing refused."""
    trainer = Trainer(CASES[1])
    with Join([trainer.model], enable=False):
        for _ in range(5):
            trainer.step()
    with Join([trainer.state, trainer.model]):
        for _ in range(5):
            trainer.step()
    trainer.step()
    trainer.state.finish()


def test_a_join_that_is_switched_off_is_none() -> None:
    run_ranks(switched_off, 2)
