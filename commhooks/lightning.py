"""Lightning's Trainer with a state of commhooks: one more callback, nothing else changes.

    trainer = lightning.Trainer(strategy="ddp", callbacks=[Consensus(commhooks.LocalSGD(tau=8))])
    trainer.fit(module, loader)

By itself Lightning validates every rank's own model, and saves that of rank 0.
"""

from __future__ import annotations

import signal
from contextlib import ExitStack
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, Checkpoint, WeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from commhooks.engine.network.agreement import tell
from commhooks.engine.network.communicator import open_communicator
from commhooks.engine.state import CommHookState
from commhooks.engine.vectors.devices import HostCopy, side_stream
from commhooks.errors import RegistrationError
from commhooks.frameworks import comm_metrics, successor

__all__ = ["Consensus"]

# A worker that is so many batches ahead of another one waits for it. With tau=32 it would, too.
_ASKED_EVERY = 32


class Consensus(Callback):
    """Trains with a state, validates and saves the consensus model, and ends on it.

    ``fit`` registers the state as soon as Lightning has wrapped the model in DDP, on GPUs and on
    the CPU, along with the optimizers and the GradScaler of ``precision="16-mixed"``. At its end
    every rank has the consensus model, and the registration ends. A later ``fit`` trains with a
    new state of the same hyper-parameters, which is then in ``state``.

    - Checkpoints, of weights alone too, hold the consensus model and rank 0's optimizer. A fit
      from ``ckpt_path`` starts every rank from the consensus model, and the algorithm begins anew.
    - ``WeightAveraging`` (such as ``EMAWeightAveraging``) averages over time what each rank has.
      What is validated, saved and left at the end is the mean of these averages over the ranks;
      the same holds for what ``StochasticWeightAveraging`` leaves at the end.
    - The state's counters are logged as ``comm/...`` every ``log_every_n_steps``.
    - A SIGTERM on any rank stops all of them before the same batch, on the consensus model, 32 to
      64 batches later. By itself Lightning asks for it by a broadcast before every batch, for which
      all workers wait.

    Args:
        state: the state to train with, not registered yet. It is not given to ``DDPStrategy``.

    Raises:
        RegistrationError: by ``fit``, on every rank: a callback unfreezes parameters after DDP was
            built (``BackboneFinetuning``), the strategy has a communication hook already, or
            :meth:`commhooks.CommHookState.register` refuses the model or the optimizers.
    """

    def __init__(self, state: CommHookState) -> None:
        self.state = state
        self._used = False
        self._trains = False
        self._validation = ExitStack()
        self._signals: _Signals | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and take the place behind all other callbacks."""
        if stage != "fit":
            return
        for callback in trainer.callbacks:
            if isinstance(callback, BaseFinetuning):
                raise RegistrationError(
                    f"{type(callback).__name__} unfreezes parameters after DDP was built, which "
                    "then averages neither their gradients nor lets a state average them. Freeze "
                    "and unfreeze between two calls of fit() instead."
                )
        if getattr(trainer.strategy, "_ddp_comm_hook", None) is not None:
            raise RegistrationError(
                "DDPStrategy was given a communication hook, and commhooks.lightning.Consensus "
                "registers one; leave out ddp_comm_state and ddp_comm_hook."
            )
        # Callbacks that replace the weights at the end of training come before finish(), and
        # checkpoints after it. A new list, since Lightning goes through the old one right now.
        others = [callback for callback in trainer.callbacks if callback is not self]
        savers = [callback for callback in others if isinstance(callback, Checkpoint)]
        trainer.callbacks = [c for c in others if c not in savers] + [self, *savers]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the state: the model is wrapped, and its optimizers are built."""
        if self._used:
            self.state = successor(self.state)
        self._used = True
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.state.register(trainer.strategy.model, *trainer.optimizers, scaler=scaler)
        self._trains = True
        # Lightning calls this on every rank and writes what rank 0 has. Callbacks are not asked
        # where weights alone are saved.
        trainer.strategy.lightning_module_state_dict = _Weights(self.state, pl_module)
        if trainer.world_size > 1:
            self._signals = _Signals(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Log the state's counters."""
        if self._trains and trainer.global_step % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics(comm_metrics(self.state.stats), step=trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enter the consensus model."""
        if not self._trains:
            return
        averages = _swappers(trainer)
        # Lightning will put the averages over time in place for the validation: they are what has
        # to be averaged over the ranks.
        for average in averages:
            average._swap_models(pl_module)
            self._validation.callback(average._swap_models, pl_module)
        self._validation.enter_context(self.state.averaged())
        for average in averages:
            average._swap_models(pl_module)
            self._validation.callback(average._swap_models, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the consensus model."""
        self._validation.close()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the mean over the ranks in the place of rank 0's average over time."""
        if not self._trains:
            return
        for average in _swappers(trainer):
            average._swap_models(pl_module)
            try:
                checkpoint["state_dict"] = _Weights(self.state, pl_module)()
            finally:
                average._swap_models(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End on the consensus model; Lightning throws the DDP wrapper away."""
        if self._trains:
            signals = self._signals
            if signals is not None:
                # Nothing is in flight then.
                signals.end_together()
            self._stop(trainer)
            self.state.finish()
            self.state.close()
            if signals is not None:
                signals.ranks.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave everything as it is without this callback, on this rank alone.

        If all ranks are here, for a SIGTERM, what is saved now is the consensus model.
        """
        if self._trains:
            together = self._signals is not None and self._signals.stopped
            self._stop(trainer)
            if together:
                self.state.finish()

    def _stop(self, trainer: Trainer) -> None:
        self._trains = False
        self._validation.close()
        # Of the instance; that of the class comes to light again.
        del trainer.strategy.lightning_module_state_dict
        if self._signals is not None:
            self._signals.close()
            self._signals = None


class _Weights:
    """The weights that a checkpoint is to hold: those of the consensus model."""

    def __init__(self, state: CommHookState, module: LightningModule) -> None:
        self._state = state
        self._module = module

    def __call__(self) -> dict[str, Tensor]:
        with self._state.averaged():
            return {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in self._module.state_dict().items()
            }


class _Signals:
    """Lets a SIGTERM that some rank has received stop all of them before the same batch.

    Lightning broadcasts what rank 0 knows before every batch, and once more from the signal's
    handler. In place of both, every now and then the ranks start to sum up what they know, and look
    at the sum when they are as many batches further, where it has long been there.

    Attributes:
        stopped: whether it has.
        ranks: who is asked, over a group of its own.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.stopped = False
        self._trainer = trainer
        self._received = False
        self._batches = 0
        self._sum: Tensor | None = None
        self._arrived: torch.futures.Future[Any] | None = None
        world = dist.group.WORLD
        assert world is not None
        # Of its own: when the parts of a round are sent depends on the rank.
        self.ranks = open_communicator(world, self)
        # Both of the instance. Lightning has not registered its handlers yet.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = self._before_batch
        trainer._signal_connector._sigterm_notifier_fn = self._notice

    def _notice(self, number: int, frame: FrameType | None) -> None:
        launcher = self._trainer.strategy.launcher
        if launcher is not None and not self._received:
            launcher.kill(signal.Signals(number))
        self._received = True

    def _before_batch(self) -> None:
        self._batches += 1
        if self._batches % _ASKED_EVERY:
            return
        if self.answer():
            self.stopped = self._trainer._signal_connector.received_sigterm = True
            raise SIGTERMException
        self._ask()

    def _ask(self) -> None:
        device = self._trainer.strategy.root_device
        self._sum = torch.tensor([int(self._received)], device=device)
        self.ranks.idle = False
        self._arrived = self.ranks.all_reduce(self._sum)

    def answer(self) -> bool:
        """Whether some rank had received a signal when the ranks last asked."""
        if self._sum is None or self._arrived is None:
            return False
        with side_stream(self._sum.device):
            self._arrived.wait()
            answer = HostCopy(self._sum)
        self.ranks.idle = True
        return bool(answer.read())

    def end_together(self) -> None:
        """Take part in what ranks with more batches have asked. Collective."""
        asked = self._batches // _ASKED_EVERY
        for _ in range(max(tell(self.ranks.parent, asked)) - asked):
            self.answer()
            self._ask()
        self.answer()

    def close(self) -> None:
        """Let Lightning ask again. A signal that nobody has heeded yet is Lightning's."""
        del self._trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor
        del self._trainer._signal_connector._sigterm_notifier_fn
        self._trainer._signal_connector.received_sigterm |= self._received


def _swappers(trainer: Trainer) -> list[Any]:
    """The callbacks that keep an average over time and validate with it."""
    return [
        callback
        for callback in trainer.callbacks
        if isinstance(callback, WeightAveraging) and callback._average_model is not None
    ]
