"""Hugging Face's Trainer with a state of commhooks: one more argument, nothing else changes.

    trainer = ConsensusTrainer(model, arguments, comm_state=commhooks.LocalSGD(tau=8), ...)
    trainer.train()

By itself Trainer evaluates every rank's own model, and saves that of rank 0.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import Trainer, TrainerCallback

from commhooks.engine.state import CommHookState
from commhooks.errors import RegistrationError
from commhooks.frameworks import comm_metrics, successor

__all__ = ["ConsensusMixin", "ConsensusTrainer"]

logger = logging.getLogger("commhooks")


class ConsensusMixin:
    """Makes any class of Trainer train with a state, evaluate and save the consensus model.

    It comes first among the bases: ``class MyTrainer(ConsensusMixin, Seq2SeqTrainer): ...``.

    ``train()`` registers the state once Trainer has wrapped the model, and ends on the consensus
    model. A later ``train()`` goes on with the same state, or, where Trainer wraps the model anew
    (``model_init``), with a new one of the same hyper-parameters, which is then in
    ``comm_state``. The state's counters are logged as ``comm/...`` with everything else.

    Callbacks find the consensus model in ``on_evaluate``, ``on_save`` and ``on_train_end``, and the
    rank's own in all others.

    What Trainer writes as ``checkpoint-N`` holds the consensus model and rank 0's optimizer.
    ``train(resume_from_checkpoint=...)`` therefore starts every rank from the consensus model, and
    the algorithm begins anew. To go on bit for bit, use :func:`commhooks.accelerate.checkpoint`.

    Args:
        *args: Trainer's own.
        comm_state: the state to train with, not registered yet; None means plain DDP.
        **kwargs: Trainer's own.

    Raises:
        RegistrationError: ``auto_find_batch_size`` is set; or, by ``train()``, what
            :meth:`commhooks.CommHookState.register` refuses.
    """

    # Trainer's, which a mixin cannot know.
    args: Any
    model_wrapped: Any
    optimizer: Any
    is_in_train: bool
    callback_handler: Any

    def __init__(self, *args: Any, comm_state: CommHookState | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.comm_state = comm_state
        self._registered = False
        self._wrapper: Any = None
        if comm_state is None:
            return
        if self.args.auto_find_batch_size:
            raise RegistrationError(
                "auto_find_batch_size=True starts training anew on a rank that runs out of "
                "memory, which the other ranks do not know of; choose per_device_train_batch_size."
            )
        # In front of Trainer's own, so that those find the consensus model at the end of training.
        self.callback_handler.callbacks.insert(0, _Registration(self))
        self._on_save = self.callback_handler.on_save
        self.callback_handler.on_save = self._saved

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's, of the consensus model. Collective."""
        with self._consensus():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)  # type: ignore[misc]
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, of the consensus model. Collective."""
        with self._consensus():
            return super().predict(*args, **kwargs)  # type: ignore[misc]

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, of the consensus model. Collective."""
        with self._consensus():
            super().save_model(*args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with the state's counters."""
        if self.comm_state is not None:
            logs = logs | comm_metrics(self.comm_state.stats)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _saved(self, *args: Any, **kwargs: Any) -> Any:
        # Callbacks copy or upload the model here, and Trainer calls them outside save_model.
        with self._consensus():
            return self._on_save(*args, **kwargs)

    def _consensus(self) -> AbstractContextManager[None]:
        # Out of training every rank has the consensus model already.
        if self.comm_state is None or not self._registered or not self.is_in_train:
            return nullcontext()
        return self.comm_state.averaged()

    def _begin(self) -> None:
        """Register the state, unless it is at home in this wrapper already."""
        assert self.comm_state is not None
        if self._registered and self._wrapper is self.model_wrapped:
            return
        if self._registered:
            self.comm_state.close()
            self.comm_state = successor(self.comm_state)
        if self.args.average_tokens_across_devices:
            logger.warning(
                "commhooks: average_tokens_across_devices=True, Trainer's default, makes all ranks "
                "wait for each other at every step; set it to False in TrainingArguments."
            )
        self.comm_state.register(self.model_wrapped, self.optimizer)
        self._registered, self._wrapper = True, self.model_wrapped

    def _end(self) -> None:
        assert self.comm_state is not None
        self.comm_state.finish()


class ConsensusTrainer(ConsensusMixin, Trainer):
    """Hugging Face's Trainer with :class:`ConsensusMixin`."""


class _Registration(TrainerCallback):
    """Trainer's own word of when the model is wrapped, and when training is over."""

    def __init__(self, trainer: ConsensusMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._begin()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._trainer._end()
