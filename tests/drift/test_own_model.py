"""Pins who is told that a rank's own model is not the result: past DDP, and on one rank."""

import copy
import io
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhooks
from tests.cases import one_case
from tests.drift.test_advice import until_gone
from tests.harness import run_ranks
from tests.heard import heard
from tests.training import Trainer

X = torch.ones(2, 5)


def evaluate(module: nn.Module) -> None:
    module.eval()
    with torch.no_grad():
        module(X)
    module.train()


def infer(trainer: Trainer) -> None:
    trainer.model.eval()
    with torch.inference_mode():
        trainer.model.module(X)
    trainer.model.train()  # type: ignore[no-untyped-call]


def pickled(trainer: Trainer) -> None:
    torch.save(trainer.model.module, io.BytesIO())


WRONG: dict[str, tuple[str, Callable[[Trainer], Any]]] = {
    "evaluate module": ("evaluated", lambda trainer: evaluate(trainer.model.module)),
    "infer with module": ("evaluated", infer),
    "save module": ("saved", lambda trainer: trainer.model.module.state_dict()),
    "save model": ("saved", lambda trainer: trainer.model.state_dict()),
    "copy module": ("saved", lambda trainer: copy.deepcopy(trainer.model.module)),
    "pickle module": ("saved", pickled),
}
WORDS = {"evaluated": "evaluated outside averaged()", "saved": "called outside averaged()"}


def told(name: str, where: str) -> list[str]:
    """What is said of a use on rank 0, every other step."""
    _, use = WRONG[name]
    with heard() as lines:
        trainer = Trainer(one_case("LocalSGD", 3, warmup_steps=1))
        for step in range(1, 8):
            trainer.step()
            if where == "inside":
                with trainer.state.averaged():
                    use(trainer)
            elif where == "outside" and step % 2 == 0 and dist.get_rank() == 0:
                use(trainer)
        trainer.state.finish()
        use(trainer)
    return lines


@pytest.mark.parametrize("name", WRONG)
def test_rank_0_alone_takes_its_own_model_for_the_result(name: str) -> None:
    first, other = run_ranks(told, 2, name, "outside")
    kind, _ = WRONG[name]
    assert len(first) == 1
    assert WORDS[kind] in first[0]
    assert other == []


@pytest.mark.parametrize("where", ["inside", "after"])
@pytest.mark.parametrize("name", WRONG)
def test_nothing_is_said_of_the_consensus_model(name: str, where: str) -> None:
    assert run_ranks(told, 2, name, where) == [[], []]


def saves_the_run(order: str) -> list[str]:
    with heard() as lines:
        trainer = Trainer(one_case("CoCoDSGD", 3))
        for step in range(1, 8):
            trainer.step()
            if step % 2 and order == "model first":
                trainer.saved()
            elif step % 2:
                trainer.state.state_dict()
                trainer.model.module.state_dict()
        trainer.state.finish()
    return lines


@pytest.mark.parametrize("order", ["model first", "state first"])
def test_nothing_is_said_of_a_run_that_is_saved_to_go_on(order: str) -> None:
    assert run_ranks(saves_the_run, 2, order) == [[], []]


def loads() -> list[str]:
    """As safetensors loads a model, and as Accelerate's files are looked through."""
    with heard() as lines:
        trainer = Trainer(one_case("LocalSGD", 3))
        trainer.step()
        kept = trainer.saved()
        trainer.step()
        trainer.model.module.state_dict()
        trainer.go_on(kept, 1)
        trainer.step()
        trainer.model.state_dict(keep_vars=True)
        trainer.step()
        trainer.state.finish()
    return lines


def test_nothing_is_said_of_loading() -> None:
    assert run_ranks(loads, 2) == [[], []]


def saves_last() -> list[str]:
    with heard() as lines:
        trainer = Trainer(one_case("LocalSGD", 3))
        trainer.step()
        trainer.model.module.state_dict()
        engine = weakref.ref(trainer.state._engine)
        del trainer
        until_gone(engine)
    return lines


def test_a_wrong_save_is_the_last_that_is_done() -> None:
    first, other = run_ranks(saves_last, 2)
    assert [WORDS["saved"] in line for line in first] == [True, False]
    assert len(other) == 1


def scripts() -> int:
    """torch.jit takes the module, inside averaged() and behind finish()."""
    model = DistributedDataParallel(nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = commhooks.LocalSGD(tau=2)
    state.register(model, optimizer)
    made = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for _ in range(3):
            model(X).sum().backward()
            optimizer.step()
            with state.averaged():
                torch.jit.script(model.module)
                made += 1
        state.finish()
        torch.jit.script(model.module)
    return made + 1


def test_the_module_can_be_scripted_where_it_is_the_consensus() -> None:
    assert run_ranks(scripts, 2) == [4, 4]


def hooks_in_forwards(compiled: bool) -> list[int]:
    """How many hooks the module within has while DDP calls it, and how many frames are compiled."""
    seen = []

    class Noting(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.compiler.is_compiling():
                seen.append(len(self._forward_pre_hooks))
            return super().forward(x)

    frames = 0

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal frames
        frames += 1
        return graph.forward

    module: Any = Noting(5, 3)
    model = DistributedDataParallel(
        torch.compile(module, backend=backend, fullgraph=True) if compiled else module
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = commhooks.LocalSGD(tau=2)
    state.register(model, optimizer)
    for _ in range(5):
        model(X).sum().backward()
        optimizer.step()
    with heard() as lines:
        evaluate(model.module)
    state.finish()
    assert (len(lines) == 1) == (dist.get_rank() == 0)
    return [frames] if compiled else seen[:5]


def test_no_hook_is_called_where_ddp_calls_the_module() -> None:
    assert run_ranks(hooks_in_forwards, 2, False) == [[0] * 5] * 2


def test_a_compiled_module_is_compiled_as_often_as_without() -> None:
    """Once to train, and once to evaluate."""
    assert run_ranks(hooks_in_forwards, 2, True, tidy=False) == [[2], [2]]
