"""Many small games in one launch: each is played by a team of ranks with a group of its own."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from tests.cases import Case
from tests.harness import Outcome, rank_outcomes
from tests.training import Trainer


class Survived(Exception):
    """No error where one had to be."""


@dataclass(frozen=True)
class Game:
    """After ``steps`` steps of ``case``, each member of a team makes a call of its own."""

    case: Case
    steps: int
    calls: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.case} after step {self.steps}: {' against '.join(self.calls)}"


def played(
    play: Callable[[Trainer, Game, str], str], games: Sequence[Game], timeout: float = 40.0
) -> Iterator[tuple[Game, list[Outcome[str]]]]:
    """Every game, and what came out of ``play`` on the members of its team.

    The groups' own timeout is far away, so that a rank that waits for another is found stuck.
    """
    size = sum(len(game.calls) for game in games)
    outcomes = iter(rank_outcomes(_play, size, play, games, timeout=timeout, group_timeout=600.0))
    for game in games:
        yield game, [next(outcomes) for _ in game.calls]


def _play(play: Callable[[Trainer, Game, str], str], games: Sequence[Game]) -> str:
    mine, first = None, 0
    for game in games:
        ranks = range(first, first + len(game.calls))
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            mine = game, group
        first += len(game.calls)
    assert mine is not None
    game, group = mine
    trainer = Trainer(replace(game.case, ddp={"process_group": group}))
    trainer.rank = dist.get_rank(group)
    for _ in range(game.steps):
        trainer.step()
    return play(trainer, game, game.calls[trainer.rank])
