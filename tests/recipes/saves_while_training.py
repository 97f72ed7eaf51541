"""Saves while training, by Trainer and by Lightning, beside the consensus model of that moment.

accelerate launch ... saves_while_training.py trainer|lightning FOLDER
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "recipes")]

import common.torchvision_cpu  # noqa: E402, F401 (before what imports torchvision)

# isort: split
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

import commhooks  # noqa: E402
from common.options import FitOptions  # noqa: E402
from common.text import load_text  # noqa: E402

FRAMEWORK, FOLDER = sys.argv[1], Path(sys.argv[2])
# Off the boundary, so that the workers' models differ.
STEP, STEPS, TAU = 5, 6, 4
FIT = FitOptions(max_steps=STEPS, output_dir=FOLDER, wandb="disabled", width=16, context=16)
state = commhooks.LocalSGD(tau=TAU)


def keep_consensus(model: nn.Module) -> None:
    """What the save has to be equal to, and how far this worker's model is from it."""
    own = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
    with state.averaged():
        consensus = {name: value.clone() for name, value in model.state_dict().items()}
        mean = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert (own - mean).abs().max() > 1e-4
    if dist.get_rank() == 0:
        torch.save(consensus, FOLDER / "consensus.pt")


def with_trainer() -> None:
    from transformers import TrainerCallback

    import trainer as recipe

    class Save(TrainerCallback):
        def on_step_end(self, args: Any, progress: Any, control: Any, **_: Any) -> None:
            if progress.global_step == STEP:
                keep_consensus(training.model)
                training.save_model(str(FOLDER / "saved"))

    config = recipe.Config(fit=FIT)
    training = recipe.build_trainer(config, state)
    training.add_callback(Save())
    training.train()


def with_lightning() -> None:
    from lightning import Callback
    from torch.utils.data import DataLoader

    import lightning_fit as recipe

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, module: nn.Module, *_: Any) -> None:
            if trainer.global_step == STEP:
                keep_consensus(module)
                trainer.save_checkpoint(FOLDER / "saved.ckpt")

    training = recipe.build_trainer(recipe.Config(fit=FIT), state)
    training.callbacks.insert(0, Save())
    windows = load_text(None, FIT.context).test
    training.fit(recipe.LanguageModel(FIT), *2 * [DataLoader(windows, batch_size=16)])


if __name__ == "__main__":
    with_trainer() if FRAMEWORK == "trainer" else with_lightning()
    dist.destroy_process_group()
