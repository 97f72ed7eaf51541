"""Checkpoints of an accelerated run that hold every rank, with one call to set up.

    state.register(model, optimizer)
    commhooks.accelerate.checkpoint(accelerator, state)
    accelerator.save_state(folder)
    accelerator.load_state(folder)

By itself Accelerate saves rank 0's model, optimizer and registered objects and gives them to
every rank. Between two rounds that is not what the other ranks had.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from commhooks.accelerate.every_rank import EveryRank

if TYPE_CHECKING:
    from accelerate import Accelerator

    from commhooks.engine.state import CommHookState

__all__ = ["checkpoint"]


def checkpoint(accelerator: Accelerator, state: CommHookState) -> None:
    """Make ``accelerator.save_state`` and ``load_state`` keep what each rank has of its own.

    Call it once for every state, after ``state.register`` (or ``register_comm_hook``) and before
    the first ``save_state`` or ``load_state``. All three are collective: every rank calls them.
    Several states, such as those of the two models of a GAN, are given in the same order on every
    rank. Saving changes nothing of the run.

    - ``commhooks-rank-R-of-N.pt`` holds rank R's parameters and buffers of every model that has a
      state, the states, the optimizers and the GradScaler: tensors and plain values.
    - ``commhooks-objects-rank-R-of-N.pkl`` holds rank R's schedulers and what was given to
      ``register_for_checkpointing``, such as an EMA. Accelerate pickles these objects, so this file
      is to be trusted as much as Accelerate's own.
    - All other files, ``model.safetensors`` and what the script's own save hooks write included,
      hold the consensus model, the one to evaluate or to publish.

    ``load_state`` restores each rank last of all, after the script's own load hooks. On another
    number of ranks than saved, it starts every rank from the consensus model, takes the anchor
    over where the algorithm has one, clears the state of the optimizers that train a model with a
    state, and logs what was reset.

    Args:
        accelerator: whose ``prepare`` the models and the optimizers went through.
        state: the registered state of one of the models.

    Raises:
        RegistrationError: the accelerator has this state already, no model of this state can be
            found, or the other ranks gave another state.
        CheckpointError: by ``load_state``, on every rank and before anything has changed: a file
            is missing or damaged on a rank, Accelerate's own files included, or is of another step,
            another algorithm, other hyper-parameters or another model. Also by both, on every
            rank, where saving or loading failed on one of them, which then raises its own error.
        RoundError: by ``save_state``: a round failed, or it was not called on every rank.
    """
    existing = (known for known in accelerator._custom_objects if isinstance(known, EveryRank))
    ranks = next(existing, None) or EveryRank(accelerator)
    ranks.add(state)
