"""What a recipe's options have in common: what W&B keeps of them, and what a resumed run shares."""

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any

from common.algorithms import AlgorithmOptions, hyper_parameters, run_name
from common.checkpointing import CheckpointOptions
from common.options import FeedOptions, RunOptions
from common.tracking import RunIdentity, versions

__all__ = ["RecipeConfig"]

# Options that no result depends on: folders of this machine, and what W&B records on its own.
_PLUMBING = (
    "data_dir",
    "text",
    "preset",
    "output_dir",
    "json",
    "pace",
    "wandb",
    "project",
    "group",
    "tags",
)
# Options that decide no weight.
_FEEDING = ("data_dir", "text", "preset", "loader_workers")


class RecipeConfig(ABC):
    """Everything a run depends on, in the groups that --help shows.

    A recipe's own is a frozen dataclass with these fields; ``training`` is what its model and
    optimizer are made of.
    """

    method: AlgorithmOptions
    training: Any
    data: FeedOptions
    run: RunOptions
    checkpoints: CheckpointOptions

    @property
    @abstractmethod
    def subject(self) -> tuple[str, ...]:
        """The recipe's name, what is trained on, and which model: the run's group in W&B."""

    def flat(self, workers: int) -> dict[str, Any]:
        """All that a result depends on, hyper-parameters and versions included, as plain values."""
        groups = (self.method, self.training, self.data, self.run)
        options = {name: value for group in groups for name, value in asdict(group).items()}
        for name in _PLUMBING:
            options.pop(name, None)
        options |= hyper_parameters(self.method)
        recipe, dataset, model = self.subject
        names = {"recipe": recipe, "dataset": dataset, "model": model}
        return {**options, **names, "workers": workers, "versions": versions()}

    def course(self) -> dict[str, Any]:
        """The options that decide the weights, which a run that is resumed must share."""
        options = asdict(self.method) | asdict(self.training) | asdict(self.data)
        for name in _FEEDING:
            options.pop(name, None)
        options["dataset"] = self.subject[1]
        return options | {
            name: getattr(self.run, name)
            for name in ("seed", "scale_lr", "mixed_precision", "accumulate")
        }

    def identity(self, workers: int) -> RunIdentity:
        """What tells this run from others, in W&B and in the results."""
        method, data, run = self.method, self.data, self.run
        _, dataset, model = self.subject
        return RunIdentity(
            name=run_name(
                method,
                lr=self.training.lr,
                seed=run.seed,
                others=(*(["scaled"] if run.scale_lr else []), data.partition, f"{workers}w"),
            ),
            group=run.group or " ".join(self.subject),
            job_type="train",
            tags=(method.algorithm, model, dataset, data.partition, *run.tags),
        )
