"""Train a small byte-level language model over several processes with any algorithm of commhooks.

    python recipes/start.py recipes/language.py --algorithm local-sgd

Runs on GPUs where there is one for each process and on the CPU elsewhere. Trains on the text that
comes with Python, or on --text FILE, and reports bits per byte of the consensus model on text that
was held out. At the end the model writes a few lines.

With --fsdp, the ranks of an island hold one model together (FSDP2), and the islands average theirs:

    accelerate launch --multi_gpu --num_processes 4 recipes/language.py --algorithm diloco \\
        --fsdp --island 2
"""

import common.ctrl_c  # noqa: F401 - before what takes long to import

# isort: split
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer

from common.algorithms import AlgorithmOptions, island_size
from common.checkpointing import CheckpointOptions
from common.config import RecipeConfig
from common.errors import RecipeError
from common.options import RunOptions, TextOptions, read_command_line, require
from common.run import Run, conduct
from common.schedules import cosine_schedule
from common.text import Text, load_text
from common.training import Evaluation, evaluate_language_model
from common.transformer import ByteTransformer, generate

_PROMPT = b"\ndef "


@dataclass(frozen=True)
class TrainingOptions:
    """The model, and how each worker trains it: AdamW."""

    layers: int = 3
    """Blocks of attention and perceptron."""
    width: int = 96
    """Numbers that stand for a byte between two blocks."""
    heads: int = 4
    """Attention heads of a block; they share its width."""
    epochs: int = 1
    """Passes of each worker over its share of the data."""
    lr: float = 2e-3
    """Learning rate after its warm-up."""
    lr_start: float = 2e-4
    """Learning rate of the first step, from which it rises linearly."""
    lr_warmup_epochs: float = 0.1
    """Epochs it rises for."""
    lr_end: float = 2e-4
    """Learning rate at the end, to which it falls along a cosine."""
    weight_decay: float = 0.1
    """Decay of weight matrices and embeddings, decoupled from the gradient."""
    clip: float = 1.0
    """Largest norm of a gradient, each worker's own; 0 leaves gradients as they are."""
    sample: int = 400
    """Bytes that the consensus model writes at the end."""
    fsdp: tyro.conf.FlagCreatePairsOff[bool] = False
    """Shard the model over the ranks of each --island with FSDP2, for models that do not fit one
    GPU. Without checkpoints."""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "epochs"):
            require(self, name, 1)
        require(self, "lr", 1e-12)
        for name in ("lr_start", "lr_warmup_epochs", "lr_end", "weight_decay", "clip", "sample"):
            require(self, name, 0)
        if self.width % self.heads:
            raise RecipeError(f"--width {self.width} does not divide over --heads {self.heads}")


@dataclass(frozen=True)
class Config(RecipeConfig):
    """Everything a run of this recipe depends on."""

    method: AlgorithmOptions = field(default_factory=AlgorithmOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    data: TextOptions = field(default_factory=TextOptions)
    run: RunOptions = field(default_factory=RunOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)

    def __post_init__(self) -> None:
        if not self.training.fsdp:
            return
        if self.method.island is None:
            raise RecipeError(
                "--fsdp needs to know which ranks hold a model together: add --island node, or "
                "--island and a number of neighbouring ranks"
            )
        if self.checkpoints.enabled:
            raise RecipeError(
                "this recipe keeps no checkpoints of a sharded model: leave out --checkpoint-every "
                "and --resume, or --fsdp"
            )
        if self.run.mixed_precision == "fp16":
            raise RecipeError("--fsdp takes --mixed-precision bf16, which needs no GradScaler")

    @property
    def subject(self) -> tuple[str, str, str]:
        """Recipe, data and model."""
        text = "python" if self.data.text is None else self.data.text.name
        return "language", text, f"transformer-{self.training.layers}x{self.training.width}"


class LanguageRun(Run):
    """One worker's part of a run."""

    config: Config

    def build(self, data: Text) -> tuple[nn.Module, Optimizer]:
        """The transformer, and AdamW that decays what multiplies."""
        options = self.config.training
        model = ByteTransformer(
            context=self.config.data.context,
            width=options.width,
            heads=options.heads,
            layers=options.layers,
        )
        if self.sharded:
            self._shard(model)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": matrices},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = AdamW(
            groups,
            lr=options.lr,
            betas=(0.9, 0.95),
            weight_decay=options.weight_decay,
        )
        return model, optimizer

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 takes the place of DDP."""
        return self.config.training.fsdp

    def _shard(self, model: ByteTransformer) -> None:
        """Deal the model out to the ranks of this island, and tell the state who its peers are."""
        assert self.state is not None
        ranks, size = self.accelerator.num_processes, island_size(self.config.method)
        if ranks % size:
            raise RecipeError(f"--island {size} does not divide the {ranks} processes")
        device = self.accelerator.device
        mesh = init_device_mesh(
            device.type, (ranks // size, size), mesh_dim_names=("island", "shard")
        )
        half = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=half)
        model.to(device)
        # Nobody writes to the logits, which are a view.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh["shard"], mp_policy=policy)
        # The mesh says who makes an island.
        self.state.island = None
        self.state.process_group = mesh["island"].get_group()

    def learning_rate_factor(self, step: int) -> float:
        """Warm-up, then a cosine down to the end."""
        options = self.config.training
        return cosine_schedule(
            step,
            start=options.lr_start / options.lr,
            warmup_steps=round(options.lr_warmup_epochs * self.steps_per_epoch),
            total_steps=options.epochs * self.steps_per_epoch,
            end=options.lr_end / options.lr,
        )

    def train_on(self, batch: Tensor) -> Tensor:
        """One batch of windows, as under plain DDP."""
        with self.accelerator.accumulate(self.model):
            logits = self.model(batch[:, :-1])
            loss = cross_entropy(logits.transpose(1, 2), batch[:, 1:].long())
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients and self.config.training.clip > 0:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.training.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss

    def evaluate(self) -> Evaluation:
        """Bits per byte of the text that was held out."""
        return evaluate_language_model(self.accelerator, self.model, self.test_loader)

    def show_model(self) -> None:
        """Let the model write, and print it."""
        length = self.config.training.sample
        main = self.accelerator.is_main_process
        # Every forward of a sharded model takes all its ranks.
        if length == 0 or not (main or self.sharded):
            return
        model = self.accelerator.unwrap_model(self.model).eval()
        written = generate(model, _PROMPT, length, temperature=0.8)
        # A model of bytes may break off in the middle of a character.
        text = (_PROMPT + written).decode(errors="replace")
        if main:
            print(f"\nA sample of the consensus model:\n{text}", flush=True)


@record
def main() -> None:
    """Train as the command line says."""
    config = read_command_line(Config, __doc__ or "")
    conduct(config, lambda: load_text(config.data.text, config.data.context), LanguageRun)


if __name__ == "__main__":
    main()
