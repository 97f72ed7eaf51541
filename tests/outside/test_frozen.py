"""Pins frozen parameters that the loop writes: in the consensus they are means, as students are.

An EMA teacher is a linear function of its student's history. So the mean of the teachers is the
teacher of the mean student, and belongs beside it.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commhooks
from tests.buffers.holder import same_bits
from tests.cases import Case
from tests.harness import run_ranks
from tests.optimizers.warnings_of import logged_warnings
from tests.training import Form, Trainer
from tests.workload import initialise, ragged_model, seeded

Follow = Callable[[nn.Module, nn.Module], None]


class Distilled(nn.Module):
    """A student, its frozen teacher, and frozen parameters that are no floating-point numbers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.student = ragged_model()
        self.teacher = ragged_model(dtype).requires_grad_(False)
        self.base = nn.Linear(64, 64)
        initialise(self.base).requires_grad_(False)
        self.others = nn.Module()
        for name, like in (
            ("codes", torch.arange(4)),
            ("flags", torch.ones(4) > 0),
            ("mine", torch.zeros(2)),
        ):
            self.others.register_parameter(name, nn.Parameter(like.clone(), requires_grad=False))
        self._ddp_params_and_buffers_to_ignore = ["others.mine"]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.student(x)
        return y


def distilled(dtype: torch.dtype) -> nn.Module:
    return Distilled()


def in_half(dtype: torch.dtype) -> nn.Module:
    return Distilled(torch.bfloat16)


def ema(teacher: nn.Module, student: nn.Module) -> None:
    with torch.no_grad():
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            t.lerp_(s.to(t.dtype), 0.3)


def ema_through_data(teacher: nn.Module, student: nn.Module) -> None:
    """As most published loops have it: the parameters' version counters do not move."""
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.data.mul_(0.7).add_(s.data.to(t.dtype), alpha=0.3)


def copied(teacher: nn.Module, student: nn.Module) -> None:
    """A target network."""
    teacher.load_state_dict(student.state_dict())


def frozen(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if not p.requires_grad}


def teach(case: Case, form: Form, follow: Follow) -> dict[str, dict[str, Tensor]]:
    """What is frozen on this rank: its own, inside averaged() twice, afterwards, after finish()."""
    trainer = Trainer(case, form)
    module = trainer.model.module
    assert isinstance(module, Distilled)
    for step in range(5):
        trainer.step()
        follow(module.teacher, module.student)
        module.get_parameter("others.codes").fill_(trainer.rank + step)
        module.get_parameter("others.flags")[trainer.rank] = False
        module.get_parameter("others.mine").fill_(trainer.rank)
    seen = {"own": frozen(module)}
    for time in ("first", "second"):
        with trainer.state.averaged():
            seen[time] = frozen(module)
        seen[f"after the {time}"] = frozen(module)
    trainer.state.finish()
    seen["finish"] = frozen(module)
    trainer.step()
    return seen


def assert_consensus(ranks: Sequence[dict[str, dict[str, Tensor]]]) -> None:
    own = [rank["own"] for rank in ranks]
    for number, rank in enumerate(ranks):
        for time in ("after the first", "after the second"):
            assert all(same_bits(rank[time][name], mine) for name, mine in own[number].items())
        for time in ("first", "second", "finish"):
            for name, value in rank[time].items():
                if name == "others.mine":
                    assert same_bits(value, own[number][name]), (time, name)
                    continue
                assert same_bits(value, ranks[0][time][name]), (time, name, number)
                if value.is_floating_point():
                    mean = torch.stack([each[name].double() for each in own]).mean(0)
                    off = (value.double() - mean).abs().max().item()
                    assert off < (1e-2 if value.dtype == torch.bfloat16 else 1e-6), (
                        time,
                        name,
                        off,
                    )
                else:
                    assert same_bits(value, own[0][name]), (time, name)


@pytest.mark.parametrize("form", ["register", "hook"])
@pytest.mark.parametrize("follow", [ema, ema_through_data, copied])
def test_a_teacher_is_the_mean_of_the_teachers(follow: Follow, form: Form) -> None:
    """It was each rank's own, 0.01 to 0.04 apart after finish()."""
    ranks = run_ranks(teach, 3, Case("LocalSGD", {"tau": 2}, model=distilled), form, follow)
    assert not torch.equal(*(rank["own"]["teacher.0.weight"] for rank in ranks[:2]))
    assert_consensus(ranks)


@pytest.mark.parametrize(
    ("case", "size"),
    [
        (Case("OverlapLocalSGD", {"tau": 2}, model=in_half), 2),
        (Case("DiLoCo", {"tau": 3}, model=distilled, warmup_steps=2), 2),
        (Case("LocalSGD", {"tau": 2}, model=distilled, compression="int8"), 2),
        (Case("AllReduce", model=distilled), 2),
    ],
    ids=str,
)
def test_whatever_the_algorithm_is(case: Case, size: int) -> None:
    assert_consensus(run_ranks(teach, size, case, "register", ema))


def test_islands_average_over_all_ranks() -> None:
    case = Case("LocalSGD", {"tau": 2}, model=distilled, island=2)
    assert_consensus(run_ranks(teach, 4, case, "register", ema))


# What it costs, and what is said.


def bytes_and_warnings(write: bool) -> tuple[list[int], list[str]]:
    trainer = Trainer(Case("LocalSGD", {"tau": 2}, model=distilled))
    module = trainer.model.module
    assert isinstance(module, Distilled)
    sent = []
    with logged_warnings() as texts:
        trainer.step()
        for _ in range(2):
            if write:
                ema(module.teacher, module.student)
            before = trainer.state.stats.bytes_reduced
            with trainer.state.averaged():
                pass
            sent.append(trainer.state.stats.bytes_reduced - before)
    return sent, texts


def test_a_base_that_is_the_same_everywhere_is_not_sent() -> None:
    """The student's bytes alone, at every evaluation; then those of the teacher, too."""
    student = 4 * sum(p.numel() for p in ragged_model().parameters())
    for sent, texts in run_ranks(bytes_and_warnings, 2, False):
        assert sent == [student, student]
        assert not texts
    (first, texts), (second, silent) = run_ranks(bytes_and_warnings, 2, True)
    assert first == second == [2 * student, 2 * student]
    (text,) = texts
    assert "'teacher.0.bias', 'teacher.0.weight'" in text
    assert "_ddp_params_and_buffers_to_ignore" in text
    assert not silent


def permuted(kind: str) -> tuple[bool, list[str]]:
    """The same numbers on every rank in another order, in which sums see no difference."""
    trainer = Trainer(Case("LocalSGD", {"tau": 2}, model=distilled))
    module = trainer.model.module
    assert isinstance(module, Distilled)
    signs = torch.sign(torch.randn(64, 64, generator=seeded(5)))
    with torch.no_grad():
        module.base.weight.copy_(signs.roll(trainer.rank, 0) if kind == "rows" else signs)
        if kind == "two" and trainer.rank:
            module.base.weight[3, :2] = module.base.weight[3, :2].flip(0)
    trainer.step()
    with logged_warnings() as texts, trainer.state.averaged():
        mean = module.base.weight.abs().mean().item()
    return mean < 1, texts


@pytest.mark.parametrize("kind", ["rows", "two"])
def test_an_order_counts(kind: str) -> None:
    (mixed, texts), (_, _) = run_ranks(permuted, 2, kind)
    assert mixed
    assert "'base.weight'" in texts[0]


def of_other_shapes() -> tuple[list[str], bool]:
    """A rank builds its teacher late, and of another width."""
    trainer = Trainer(Case("LocalSGD", {"tau": 2}, model=distilled))
    trainer.step()
    module = trainer.model.module
    late = nn.Parameter(torch.full((2 + trainer.rank,), 1.0), requires_grad=False)
    module.get_submodule("others").register_parameter("late", late)
    with logged_warnings() as texts:
        trainer.state.finish()
    trainer.step()
    return texts, bool((late == 1).all())


def test_what_cannot_be_exchanged_is_told() -> None:
    (texts, kept), (_, kept_too) = run_ranks(of_other_shapes, 2)
    assert "'others.late'" in texts[0]
    assert kept
    assert kept_too


def begun_apart(how: str) -> list[str]:
    """A base that each rank loads after DDP has made them the same, or that DDP does not send."""
    module = Distilled()
    if how == "init_sync":
        module.base.weight.data.fill_(torch.distributed.get_rank())
    model = DistributedDataParallel(module, init_sync=how != "init_sync")
    if how == "loaded":
        module.base.load_state_dict(initialise(nn.Linear(64, 64)).state_dict())
        module.base.weight.data.mul_(1 + torch.distributed.get_rank())
    with logged_warnings() as texts:
        commhooks.LocalSGD(tau=2).register(
            model, torch.optim.SGD(module.student.parameters(), lr=0.1)
        )
    return texts


@pytest.mark.parametrize("how", ["loaded", "init_sync"])
def test_another_base_is_told_at_the_start(how: str) -> None:
    texts, silent = run_ranks(begun_apart, 2, how)
    assert any("begin with different frozen parameters: 'base.weight'" in text for text in texts)
    assert not silent
