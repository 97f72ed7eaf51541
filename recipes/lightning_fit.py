"""Lightning with any algorithm of commhooks, through commhooks.lightning.

    python recipes/start.py recipes/lightning_fit.py --algorithm local-sgd

Lightning takes its place among the processes that accelerate launch (or torchrun) starts. Trains a
tiny transformer on the bytes of the text that comes with Python. Nothing is downloaded. Runs on
GPUs where there is one for each process and on the CPU elsewhere.
"""

import common.ctrl_c  # before what takes long to import

# isort: split
import math
import os
from dataclasses import dataclass, field

# First: torchmetrics imports torchvision, which beside a CPU build of torch takes some help.
import common.torchvision_cpu  # noqa: F401

# isort: split
import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.utils.data import DataLoader

from commhooks import CommHooksError, CommHookState
from commhooks.lightning import Consensus
from common.algorithms import AlgorithmOptions, build_state, run_name, tell_of_rate
from common.errors import RecipeError
from common.options import FitOptions, read_command_line, refuse
from common.report import write_json
from common.session import require_workers, trains_on_cpu
from common.text import load_text, whole_batches
from common.transformer import ByteTransformer

_PRECISION = {"no": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass(frozen=True)
class Config:
    """Everything a run of this recipe depends on."""

    method: AlgorithmOptions = field(default_factory=AlgorithmOptions)
    fit: FitOptions = field(default_factory=FitOptions)


class LanguageModel(L.LightningModule):
    """A byte-level transformer as Lightning wants it."""

    def __init__(self, fit: FitOptions, state: CommHookState | None) -> None:
        super().__init__()
        self.lr = fit.lr
        self.state = state
        self.model = ByteTransformer(
            context=fit.context, width=fit.width, heads=fit.heads, layers=fit.layers
        )

    def loss(self, windows: Tensor) -> Tensor:
        logits = self.model(windows[:, :-1])
        return cross_entropy(logits.transpose(1, 2), windows[:, 1:].long())

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.loss(batch)
        # Without sync_dist: a collective at every step would hold up what the hook lets go on.
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("eval/loss", self.loss(batch), sync_dist=True, batch_size=len(batch))

    def configure_optimizers(self) -> AdamW:
        if self.state is not None:
            right = self.lr * self.state.lr_factor
            tell_of_rate(self.state, f"If --lr {self.lr:g} is that rate, give --lr {right:g}.")
        return AdamW(self.parameters(), lr=self.lr)


def build_trainer(config: Config, state: CommHookState | None) -> L.Trainer:
    """The Trainer of this worker, one of those that were launched."""
    fit = config.fit
    fit.output_dir.mkdir(parents=True, exist_ok=True)
    logger = False
    if fit.wandb != "disabled":
        logger = WandbLogger(
            name=run_name(config.method, lr=fit.lr, seed=fit.seed, others=("lightning",)),
            project=fit.project,
            save_dir=str(fit.output_dir),
            offline=fit.wandb == "offline",
            group=fit.group or "lightning",
            job_type="train",
            tags=[config.method.algorithm, "lightning", *fit.tags],
        )
    return L.Trainer(
        accelerator="cpu" if trains_on_cpu() else "gpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
        strategy="ddp",
        callbacks=[] if state is None else [Consensus(state)],
        precision=_PRECISION[fit.mixed_precision],
        max_steps=fit.max_steps,
        accumulate_grad_batches=fit.accumulate,
        gradient_clip_val=fit.clip or None,
        val_check_interval=fit.eval_every * fit.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=fit.log_every,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@record
def main() -> None:
    """Train as the command line says."""
    config = read_command_line(Config, __doc__ or "")
    fit = config.fit
    try:
        require_workers()
        state = build_state(config.method)
        text = load_text(fit.text, fit.context)
        test_set = whole_batches(text.test, fit.batch_size * int(os.environ["WORLD_SIZE"]))
    except (RecipeError, CommHooksError) as error:
        refuse(error)
    L.seed_everything(fit.seed, verbose=False)
    module = LanguageModel(fit, state)
    trainer = build_trainer(config, state)
    # Lightning gives each worker its own part of both.
    train = DataLoader(text.train, batch_size=fit.batch_size, shuffle=True, drop_last=True)
    test = DataLoader(test_set, batch_size=fit.batch_size)
    trainer.fit(module, train, test)
    during = trainer.callback_metrics.get("eval/loss")
    # Every worker holds the consensus model now.
    (figures,) = trainer.validate(module, test, verbose=False)
    loss = figures["eval/loss"]
    saved = fit.output_dir / "model.ckpt"
    trainer.save_checkpoint(saved, weights_only=True)
    if trainer.is_global_zero:
        bits = loss / math.log(2)
        print(f"test loss {loss:.4f}  bits per byte {bits:.3f}, of the consensus model")
        print(f"saved in {saved}", flush=True)
        if fit.json is not None:
            results = {
                "steps": trainer.global_step,
                "rounds": None if state is None else state.stats.rounds_completed,
                "loss": loss,
                "bits_per_byte": bits,
                "last_eval_loss": None if during is None else float(during),
            }
            write_json(results, fit.json)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
