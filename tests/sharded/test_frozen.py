"""Pins frozen shards that the loop writes: their mean over the islands is in the consensus."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.buffers.holder import same_bits
from tests.cases import Case
from tests.harness import run_ranks
from tests.optimizers.warnings_of import logged_warnings
from tests.sharded.training import TIDY, ShardedTrainer
from tests.workload import ragged_model


class Distilled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = ragged_model(), ragged_model().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.student(x)
        return y


def distilled(dtype: torch.dtype) -> nn.Module:
    return Distilled()


def shards(model: nn.Module) -> list[Tensor]:
    frozen: list[Any] = [p for p in model.parameters() if not p.requires_grad]
    return [p.to_local().detach().clone() for p in frozen]


def teach(write: bool) -> tuple[dict[str, list[Tensor]], list[int], list[str]]:
    trainer = ShardedTrainer(Case("LocalSGD", {"tau": 2}, model=distilled, island=2))
    module: Any = trainer.model
    sent = []
    with logged_warnings() as texts:
        for _ in range(3):
            trainer.step()
            if write:
                with torch.no_grad():
                    for t, s in zip(
                        module.teacher.parameters(), module.student.parameters(), strict=True
                    ):
                        t.lerp_(s, 0.3)
        seen = {"own": shards(module)}
        for _ in range(2):
            before = trainer.state.stats.bytes_reduced
            with trainer.state.averaged():
                seen["averaged"] = shards(module)
            sent.append(trainer.state.stats.bytes_reduced - before)
        seen["after"] = shards(module)
        trainer.state.finish()
        seen["finish"] = shards(module)
        trainer.step()
    return seen, sent, texts


def test_a_sharded_teacher_is_the_mean_of_the_islands() -> None:
    ranks = run_ranks(teach, 4, True, tidy=TIDY)
    for number, (seen, _, texts) in enumerate(ranks):
        peers = [ranks[peer][0] for peer in (number % 2, number % 2 + 2)]
        for position, mine in enumerate(seen["own"]):
            assert same_bits(seen["after"][position], mine)
            expected = torch.stack([each["own"][position] for each in peers]).mean(0)
            for time in ("averaged", "finish"):
                torch.testing.assert_close(seen[time][position], expected)
                assert same_bits(seen[time][position], peers[0][time][position])
        assert any("'teacher.0.weight'" in text for text in texts) == (number == 0)
    assert any(
        not same_bits(a, b) for a, b in zip(ranks[0][0]["own"], ranks[2][0]["own"], strict=True)
    )


def test_a_sharded_base_is_not_sent() -> None:
    students = []
    for _, sent, texts in run_ranks(teach, 4, False, tidy=TIDY):
        students.append(sent[0])
        assert sent[0] == sent[1]
        assert not texts
    taught = [sent[0] for _, sent, _ in run_ranks(teach, 4, True, tidy=TIDY)]
    assert taught == [2 * each for each in students]
