"""Hugging Face's Trainer with a state of commhooks: one more argument, nothing else changes.

    trainer = ConsensusTrainer(model, arguments, comm_state=commhooks.LocalSGD(tau=8), ...)
    trainer.train()

By itself Trainer evaluates every rank's own model, and saves that of rank 0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import transformers.trainer
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

    By itself Trainer gathers the loss, the count of its operations and the number of tokens
    from all ranks, for which all of them wait. With a state, other than ``AllReduce``, the loss
    that is logged is this rank's own, every rank divides by its own number of tokens
    (``average_tokens_across_devices`` is taken for False), and operations are summed up where a
    checkpoint is written and at the end.

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
    control: Any
    callback_handler: Any

    def __init__(self, *args: Any, comm_state: CommHookState | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.comm_state = comm_state
        self._registered = False
        self._logs = False
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
        self._logs = False
        if self.comm_state is not None:
            logs = logs | comm_metrics(self.comm_state.stats)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _saved(self, *args: Any, **kwargs: Any) -> Any:
        # Callbacks copy or upload the model here, and Trainer calls them outside save_model.
        with self._consensus():
            return self._on_save(*args, **kwargs)

    def store_flos(self) -> None:
        """As Trainer's, but at checkpoints and at the end alone, and not whenever it logs."""
        if not self._logs:
            super().store_flos()  # type: ignore[misc]

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, which logs this rank's loss and does not gather those of all."""
        self._logs = self._local and self.control.should_log
        with _ungathered() if self._local else nullcontext():
            super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        self._logs = False

    @property
    def _local(self) -> bool:
        return self.comm_state is not None and not self.comm_state.synchronous

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
        if self._local and self.args.average_tokens_across_devices:
            logger.info(
                "commhooks: average_tokens_across_devices=True, Trainer's default, would make all "
                "ranks wait for each other at every step; it is taken for False."
            )
            self.args.average_tokens_across_devices = False
        if self._local and self.args.include_num_input_tokens_seen != "no":
            logger.warning(
                "commhooks: include_num_input_tokens_seen makes all ranks wait for each other at "
                'every batch, since Trainer gathers the numbers; set it to "no".'
            )
        self.comm_state.register(self.model_wrapped, self.optimizer)
        self._registered, self._wrapper = True, self.model_wrapped

    def _end(self) -> None:
        assert self.comm_state is not None
        self.comm_state.finish()


class ConsensusTrainer(ConsensusMixin, Trainer):
    """Hugging Face's Trainer with :class:`ConsensusMixin`."""


@contextmanager
def _ungathered() -> Iterator[None]:
    """Let Trainer take this rank's loss for the mean of all; it gathers nothing else by this."""
    plain = transformers.trainer.nested_gather
    transformers.trainer.nested_gather = lambda own, *_: own
    try:
        yield
    finally:
        transformers.trainer.nested_gather = plain


class _Registration(TrainerCallback):
    """Trainer's own word of when the model is wrapped, and when training is over."""

    def __init__(self, trainer: ConsensusMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._begin()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._trainer._end()
