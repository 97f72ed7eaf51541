"""Train an image classifier over several processes with any algorithm of commhooks.

    python recipes/start.py recipes/vision.py --algorithm overlap-local-sgd --scale-lr

Runs on GPUs where there is one for each process and on the CPU elsewhere. The training loop is what
it would be under plain DDP; a state is registered before it, and finished after it.
"""

import common.ctrl_c  # noqa: F401 - before what takes long to import

# isort: split
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer

from common.algorithms import AlgorithmName, AlgorithmOptions
from common.checkpointing import CheckpointOptions
from common.config import RecipeConfig
from common.data import Images, load_images
from common.errors import RecipeError
from common.models import ModelName, build_model
from common.options import DataOptions, RunOptions, read_command_line, require
from common.run import Run, conduct
from common.schedules import step_schedule
from common.training import Evaluation, evaluate_classifier

# The published experiment (Wang, Liang & Joshi 2020, section 4, and its authors' scripts).
_PAPER_WORKERS = 16
_PAPER_LR = 1.6


@dataclass(frozen=True)
class TrainingOptions:
    """The model, and how each worker trains it: SGD with Nesterov momentum."""

    preset: Annotated[
        Literal["paper"] | None, tyro.conf.arg(metavar="paper", help_behavior_hint="")
    ] = None
    """paper: the published experiment, for 16 workers: CIFAR-10 (from --data-dir), ResNet-18, 300
    epochs; overlap-local-sgd with its alpha and beta. Other options override it, --tau and
    --partition among them: tau was 1, 2, 8 and 24, non-IID is major-class."""
    model: ModelName = "resnet18"
    """resnet18 is torchvision's in its CIFAR form; small-cnn is for quick looks."""
    epochs: int = 10
    """Passes of each worker over its share of the data."""
    lr: float = 0.05
    """Learning rate after its warm-up."""
    lr_start: float = 0.005
    """Learning rate of the first step, from which it rises linearly."""
    lr_warmup_epochs: float = 1.0
    """Epochs it rises for."""
    lr_milestones: Annotated[
        tuple[float, ...] | None,
        tyro.conf.arg(
            metavar="EPOCH [EPOCH ...]", help_behavior_hint="(default: 1/2 and 5/6 of the epochs)"
        ),
    ] = None
    """Epochs at which the learning rate is multiplied by --lr-decay."""
    lr_decay: float = 0.1
    """What the learning rate is multiplied by at each milestone."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 1e-4
    """L2 penalty on all parameters."""

    def __post_init__(self) -> None:
        require(self, "epochs", 1)
        require(self, "lr", 1e-12)
        for name in ("lr_start", "lr_warmup_epochs", "lr_decay", "momentum", "weight_decay"):
            require(self, name, 0)


@dataclass(frozen=True)
class Config(RecipeConfig):
    """Everything a run of this recipe depends on."""

    method: AlgorithmOptions = field(default_factory=AlgorithmOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    data: DataOptions = field(default_factory=DataOptions)
    run: RunOptions = field(default_factory=RunOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)

    @property
    def subject(self) -> tuple[str, str, str]:
        """Recipe, data and model."""
        return "vision", self.data.dataset, self.training.model

    @classmethod
    def preset(cls, name: str, algorithm: AlgorithmName) -> "Config":
        """The options that --preset ``name`` stands for, or the recipe's own defaults."""
        if name != "paper":
            return cls()
        # The other algorithms have no such options.
        overlap = AlgorithmOptions(alpha=0.6, beta=0.7)
        return cls(
            method=overlap if algorithm == overlap.algorithm else AlgorithmOptions(),
            training=TrainingOptions(
                preset="paper",
                model="resnet18",
                epochs=300,
                lr=_PAPER_LR,
                lr_start=0.1,
                lr_warmup_epochs=5,
                lr_milestones=(150, 250),
                lr_decay=0.1,
                momentum=0.9,
                weight_decay=1e-4,
            ),
            data=DataOptions(dataset="cifar10", batch_size=128),
        )

    def check_workers(self, workers: int) -> None:
        """Refuse the paper's learning rate on another number of workers than the paper's.

        Raises:
            RecipeError: it is another, and the learning rate is still that of 16 workers.
        """
        training = self.training
        if training.preset and training.lr == _PAPER_LR and workers != _PAPER_WORKERS:
            scaled = _PAPER_LR * workers / _PAPER_WORKERS
            raise RecipeError(
                f"--preset paper is for {_PAPER_WORKERS} workers, and these are {workers}: its "
                f"learning rate of {_PAPER_LR} is 0.1 for each of them. Launch {_PAPER_WORKERS}, "
                f"or say which learning rate to use; in proportion it is --lr {scaled:g}"
            )


class VisionRun(Run):
    """One worker's part of a run."""

    config: Config

    def build(self, data: Images) -> tuple[nn.Module, Optimizer]:
        """The classifier, and SGD with Nesterov momentum."""
        self.config.check_workers(self.accelerator.num_processes)
        options = self.config.training
        model = build_model(options.model, data.channels, data.classes)
        optimizer = SGD(
            model.parameters(),
            lr=options.lr,
            momentum=options.momentum,
            nesterov=options.momentum > 0,
            weight_decay=options.weight_decay,
        )
        return model, optimizer

    def learning_rate_factor(self, step: int) -> float:
        """Warm-up, then steps down at the milestones."""
        options = self.config.training
        milestones = options.lr_milestones
        if milestones is None:
            milestones = (options.epochs / 2, options.epochs * 5 / 6)
        return step_schedule(
            step,
            start=options.lr_start / options.lr,
            warmup_steps=round(options.lr_warmup_epochs * self.steps_per_epoch),
            milestones=[round(epoch * self.steps_per_epoch) for epoch in milestones],
            decay=options.lr_decay,
        )

    def train_on(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One batch, as under plain DDP."""
        images, labels = batch
        with self.accelerator.accumulate(self.model):
            loss = cross_entropy(self.model(images), labels)
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss

    def evaluate(self) -> Evaluation:
        """Loss and accuracy on the test images."""
        return evaluate_classifier(self.accelerator, self.model, self.test_loader)


@record
def main() -> None:
    """Train as the command line says."""
    config = read_command_line(Config, __doc__ or "")
    conduct(config, lambda: load_images(config.data.dataset, config.data.data_dir), VisionRun)


if __name__ == "__main__":
    main()
