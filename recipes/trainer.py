"""Hugging Face's Trainer with any algorithm of commhooks, through commhooks.transformers.

    python recipes/start.py recipes/trainer.py --algorithm local-sgd

Trains a tiny GPT-2 from scratch on the bytes of the text that comes with Python. Nothing is
downloaded. Runs on GPUs where there is one for each process and on the CPU elsewhere.
"""

import common.ctrl_c  # before what takes long to import

# isort: split
import math
import os
from dataclasses import dataclass, field

# First: transformers imports torchvision, which beside a CPU build of torch takes some help.
import common.torchvision_cpu  # noqa: F401

# isort: split
import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import Dataset, Subset
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from commhooks import CommHooksError, CommHookState
from commhooks.transformers import ConsensusTrainer
from common.algorithms import AlgorithmOptions, build_state, run_name, tell_of_rate
from common.errors import RecipeError
from common.options import FitOptions, read_command_line, refuse
from common.report import write_json
from common.session import require_workers, trains_on_cpu
from common.text import Windows, load_text, whole_batches
from common.transformer import VOCABULARY

# A label that no loss counts.
_IGNORED = -100


@dataclass(frozen=True)
class Config:
    """Everything a run of this recipe depends on."""

    method: AlgorithmOptions = field(default_factory=AlgorithmOptions)
    fit: FitOptions = field(default_factory=FitOptions)


class Samples(Dataset[dict[str, Tensor]]):
    """Windows of bytes under the names that transformers' models take them by."""

    def __init__(self, windows: Windows | Subset[Tensor]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.windows[index].long()
        # The model shifts the labels itself. The first one is never predicted, but Trainer would
        # count it in the number that a loss is divided by.
        labels = window.clone()
        labels[0] = _IGNORED
        return {"input_ids": window, "labels": labels}


def arguments(config: Config) -> TrainingArguments:
    """What Trainer is told."""
    fit = config.fit
    # Trainer's own W&B callback goes by these.
    os.environ |= {
        "WANDB_PROJECT": fit.project,
        "WANDB_MODE": fit.wandb,
        "WANDB_DIR": str(fit.output_dir),
        "WANDB_RUN_GROUP": fit.group or "trainer",
        "WANDB_JOB_TYPE": "train",
        "WANDB_TAGS": ",".join([config.method.algorithm, "trainer", *fit.tags]),
    }
    fit.output_dir.mkdir(parents=True, exist_ok=True)
    return TrainingArguments(
        output_dir=str(fit.output_dir),
        run_name=run_name(config.method, lr=fit.lr, seed=fit.seed, others=("trainer",)),
        report_to="none" if fit.wandb == "disabled" else "wandb",
        use_cpu=trains_on_cpu(),
        seed=fit.seed,
        max_steps=fit.max_steps,
        per_device_train_batch_size=fit.batch_size,
        per_device_eval_batch_size=fit.batch_size,
        gradient_accumulation_steps=fit.accumulate,
        learning_rate=fit.lr,
        max_grad_norm=fit.clip,
        bf16=fit.mixed_precision == "bf16",
        fp16=fit.mixed_precision == "fp16",
        eval_strategy="steps",
        eval_steps=fit.eval_every,
        logging_steps=fit.log_every,
        save_strategy="no",
        # Both would be a collective at every step, for which the workers wait.
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=False,
    )


def build_trainer(config: Config, state: CommHookState | None) -> ConsensusTrainer:
    """The Trainer of this worker, one of those that were launched.

    Raises:
        RecipeError: the text cannot be read, or is too short.
    """
    fit = config.fit
    text = load_text(fit.text, fit.context - 1)
    test = whole_batches(text.test, fit.batch_size * int(os.environ["WORLD_SIZE"]))
    torch.manual_seed(fit.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=fit.context,
            n_embd=fit.width,
            n_layer=fit.layers,
            n_head=fit.heads,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    return ConsensusTrainer(
        model,
        arguments(config),
        train_dataset=Samples(text.train),
        eval_dataset=Samples(test),
        comm_state=state,
    )


@record
def main() -> None:
    """Train as the command line says."""
    config = read_command_line(Config, __doc__ or "")
    fit = config.fit
    try:
        require_workers()
        state = build_state(config.method)
        trainer = build_trainer(config, state)
    except (RecipeError, CommHooksError) as error:
        refuse(error)
    if state is not None:
        tell_of_rate(
            state, f"If --lr {fit.lr:g} is that rate, give --lr {fit.lr * state.lr_factor:g}."
        )
    trainer.train()
    during = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    # Every worker holds the consensus model now.
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(fit.output_dir / "model"))
    if trainer.is_world_process_zero():
        bits = loss / math.log(2)
        print(f"test loss {loss:.4f}  bits per byte {bits:.3f}, of the consensus model")
        print(f"saved in {fit.output_dir / 'model'}", flush=True)
        if fit.json is not None:
            results = {
                "steps": trainer.state.global_step,
                "rounds": None if state is None else state.stats.rounds_completed,
                "loss": loss,
                "bits_per_byte": bits,
                "last_eval_loss": during[-1] if during else None,
            }
            write_json(results, fit.json)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
