"""One worker's part of a run, whatever it trains: the loop, and all that is kept of it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

import commhooks.accelerate
from commhooks import CommHooksError, CommHookState
from common.algorithms import build_state, island_size, tell_of_rate
from common.checkpointing import Keeper, Stopped
from common.config import RecipeConfig
from common.data import ShareOrder, share_loader, test_loader
from common.errors import RecipeError
from common.options import refuse
from common.pace import pace_of, write_pace
from common.partitions import Indices, label_counts, partition
from common.report import Results, show_results, write_results
from common.session import open_session
from common.tracking import Tracker
from common.traffic import Traffic, gradient_bytes, ring_bytes
from common.training import Evaluation, Mean, Stopwatch, over_workers, progress_bar

__all__ = ["Run", "conduct"]

# Steps from one look at whether anybody was asked to stop to the next, where tau changes.
_LOOKS_EVERY = 8


class Data(Protocol):
    """What a recipe trains and tests on; ``labels`` are those of ``train``, for the partition."""

    @property
    def train(self) -> Dataset[Any]: ...

    @property
    def test(self) -> Dataset[Any]: ...

    @property
    def labels(self) -> Indices: ...


class Run(ABC):
    """One worker's part of a run, from the data to the results.

    A recipe says which model and optimizer, what one batch does, and how to evaluate.

    Args:
        config: the recipe's options.
        state: the algorithm, or None for plain DDP.
        data: what to train and test on.
        accelerator: of this worker.
    """

    def __init__(
        self,
        config: RecipeConfig,
        state: CommHookState | None,
        data: Data,
        accelerator: Accelerator,
    ) -> None:
        self.config = config
        self.state = state
        self.accelerator = accelerator
        workers, rank = accelerator.num_processes, accelerator.process_index
        shares = partition(data.labels, workers, config.data.partition, config.run.seed)
        self.label_counts = label_counts(data.labels, shares)
        seed = config.run.seed * workers + rank
        self.order = ShareOrder(len(shares[rank]), seed)
        self.loader: DataLoader[Any] = share_loader(
            data.train,
            shares[rank],
            batch_size=config.data.batch_size,
            seed=seed,
            device=accelerator.device,
            workers=config.data.loader_workers,
            order=self.order,
        )
        self.steps_per_epoch = math.ceil(len(self.loader) / config.run.accumulate)
        self.total_steps = self.steps_per_epoch * config.training.epochs
        if config.run.max_steps is not None:
            self.total_steps = min(self.total_steps, config.run.max_steps)
        self.eval_every = config.run.eval_every or self.steps_per_epoch

        set_seed(config.run.seed)
        self._prepare(data)
        # From here on random numbers are each worker's own.
        set_seed(config.run.seed, device_specific=True)

        period = 1 if state is None else state.tau
        self.keeper = Keeper(
            accelerator,
            config.checkpoints,
            config.run.output_dir / "checkpoints",
            config.course(),
            period=period if isinstance(period, int) else _LOOKS_EVERY,
        )
        self.identity = config.identity(workers)
        self.tracker = Tracker(
            accelerator,
            self.identity,
            config.run,
            config.flat(workers),
            run_id=self.keeper.position.get("run_id"),
        )
        self.watch = Stopwatch(accelerator.device)
        self.recent_loss = Mean()
        self.epoch_loss = Mean()
        self.step = 0
        self.samples = 0
        self._pace_told = False
        self._go_on()

    @abstractmethod
    def build(self, data: Any) -> tuple[nn.Module, Optimizer]:
        """The model, the same on every worker, and its optimizer."""

    @abstractmethod
    def learning_rate_factor(self, step: int) -> float:
        """The learning rate at optimizer step number ``step``, as a multiple of --lr."""

    @abstractmethod
    def train_on(self, batch: Any) -> Tensor:
        """What one batch does under plain DDP; returns its loss."""

    @abstractmethod
    def evaluate(self) -> Evaluation:
        """Test the model as it is. Collective."""

    def show_model(self) -> None:  # noqa: B027 - a recipe may do nothing
        """Print what there is to see of the trained model, on the main process. All call it."""

    @property
    def sharded(self) -> bool:
        """Whether `build` has sharded the model, which then is not for DDP."""
        return False

    def _prepare(self, data: Data) -> None:
        model, optimizer = self.build(data)
        factor = 1.0
        if self.state is not None and self.config.run.scale_lr:
            factor = self.state.lr_factor
        elif self.state is not None:
            tell_of_rate(
                self.state, f"If --lr {self.config.training.lr:g} is that rate, add --scale-lr."
            )
        scheduler = LambdaLR(optimizer, lambda step: factor * self.learning_rate_factor(step))
        self.model = model if self.sharded else self.accelerator.prepare(model)
        self.optimizer, self.scheduler, self.test_loader = self.accelerator.prepare(
            optimizer, scheduler, test_loader(data.test)
        )
        self.traffic = Traffic(self.state)
        if self.state is not None:
            self.state.register(self.model, self.optimizer, scaler=self.accelerator.scaler)
            if not self.sharded:
                commhooks.accelerate.checkpoint(self.accelerator, self.state)

    def _position(self) -> dict[str, Any]:
        """Where this worker is, besides what Accelerate and the state know."""
        return {
            "samples": self.samples,
            "seconds": self.watch.seconds,
            "recent_loss": self.recent_loss.values,
            "epoch_loss": self.epoch_loss.values,
            "uncounted": self.traffic.uncounted,
            "run_id": self.tracker.run_id,
        }

    def _go_on(self) -> None:
        """Take up where the checkpoint ends, if there is one."""
        self.keeper.restore()
        position: Mapping[str, Any] = self.keeper.position
        if not position:
            return
        self.step, self.samples = position["step"], position["samples"]
        self.watch.go_on_from(position["seconds"])
        self.traffic.go_on_from(position["uncounted"])
        for mean, values in (
            (self.recent_loss, position["recent_loss"]),
            (self.epoch_loss, position["epoch_loss"]),
        ):
            for value in values:
                mean.add(torch.tensor(value, device=self.accelerator.device))
        if self.accelerator.is_main_process:
            print(f"going on after step {self.step} from {self.keeper.source}", flush=True)

    def to_the_end(self) -> Results:
        """Train to the end, evaluating the consensus model now and then.

        Raises:
            Stopped: a worker got SIGTERM or Ctrl-C, and the run has been saved.
        """
        reached: tuple[float, Evaluation] | None = None
        self.accelerator.wait_for_everyone()
        with progress_bar(self.accelerator) as bar:
            task = bar.add_task("", total=self.total_steps)
            with self.watch.running():
                while self.step < self.total_steps:
                    for _ in self._epoch():
                        bar.update(task, completed=self.step)
                        if self.step % self.eval_every == 0 and self.step < self.total_steps:
                            with self.watch.paused():
                                tested = self._test(bar.console, done=False)
                            if self._reached(tested[1]):
                                reached, self.total_steps = tested, self.step
                if self.state is not None:
                    self.state.finish()
            with self.traffic.not_counted():
                self.keeper.save(self.step, self._position)
            # Where the last evaluation ended the run, its consensus model is what finish() left.
            train_loss, evaluation = reached or self._test(bar.console, done=True)
        return self._results(train_loss, evaluation)

    def _epoch(self) -> Iterator[None]:
        """Train for what is left of an epoch; yields after each optimizer step."""
        epoch, steps = divmod(self.step, self.steps_per_epoch)
        batch_size = self.config.data.batch_size
        self.order.start_at(epoch, steps * self.config.run.accumulate * batch_size)
        for batch in self.loader:
            # Between two steps. What belongs to the last one, an evaluation too, is done.
            if self.accelerator.sync_gradients:
                with self.watch.paused(), self.traffic.not_counted():
                    self.keeper.look(self.step, self._position)
            loss = self.train_on(batch)
            self.samples += batch_size * self.accelerator.num_processes
            self.recent_loss.add(loss)
            self.epoch_loss.add(loss)
            if not self.accelerator.sync_gradients:
                continue
            self.step += 1
            if self.step % self.config.run.log_every == 0:
                lr = self.scheduler.get_last_lr()[0]
                self._log({"train/loss": self.recent_loss.take(), "train/lr": lr})
            self.scheduler.step()
            self._tell_pace()
            yield
            if self.step == self.total_steps:
                return

    def _test(self, console: Console, *, done: bool) -> tuple[float, Evaluation]:
        """Evaluate the consensus model, and record and show what came of it."""
        train_loss = over_workers(self.accelerator, self.epoch_loss.take(), "mean")
        # Once finished, every worker holds the consensus model; under plain DDP, at all times.
        consensus = nullcontext() if done or self.state is None else self.state.averaged()
        with self.traffic.not_counted(), consensus:
            evaluation = self.evaluate()
        measured = {f"eval/{name}": value for name, value in evaluation.measured().items()}
        self._log({"train/epoch_loss": train_loss, **measured})
        if self.accelerator.is_main_process:
            console.print(
                f"step {self.step:>5}  training loss {train_loss:.4f}  {evaluation}",
                highlight=False,
            )
        return train_loss, evaluation

    def _tell_pace(self) -> None:
        """Write what the first steps took, once, to where somebody waits for it."""
        path = self.config.run.pace
        if path is None or self._pace_told or not self.accelerator.is_main_process:
            return
        pace = pace_of(self.step, self.watch.seconds, self.traffic.stats, self.steps_per_epoch)
        if pace is not None:
            write_pace(pace, path)
            self._pace_told = True

    def _reached(self, evaluation: Evaluation) -> bool:
        """Whether the run has come to where it was to end; the same on every worker."""
        until, accuracy = self.config.run.until_accuracy, evaluation.accuracy
        return until is not None and accuracy is not None and accuracy > until

    def _log(self, metrics: dict[str, float]) -> None:
        self.tracker.log(
            metrics,
            step=self.step,
            samples=self.samples,
            seconds=self.watch.seconds,
            stats=self.traffic.stats,
        )

    def _results(self, train_loss: float, evaluation: Evaluation) -> Results:
        accelerator = self.accelerator
        workers = accelerator.num_processes
        if (stats := self.traffic.stats) is None:
            exposed = hidden = rounds = None
            payload = self.step * gradient_bytes(self.model)
        else:
            exposed = over_workers(accelerator, stats.seconds_exposed, "mean")
            hidden = over_workers(accelerator, stats.seconds_hidden, "mean")
            rounds, payload = stats.rounds_completed, stats.bytes_reduced
        return Results(
            name=self.identity.name,
            algorithm=self.config.method.algorithm,
            workers=workers,
            steps=self.step,
            samples=self.samples,
            train_loss=train_loss,
            loss=evaluation.loss,
            accuracy=evaluation.accuracy,
            bits_per_byte=evaluation.bits_per_byte,
            seconds=over_workers(accelerator, self.watch.seconds, "max"),
            seconds_exposed=exposed,
            seconds_hidden=hidden,
            bytes_sent=ring_bytes(payload, workers // island_size(self.config.method)),
            rounds=rounds,
            wandb_dir=None if self.tracker.run_dir is None else str(self.tracker.run_dir),
            config=self.config.flat(workers),
            label_counts=self.label_counts.tolist(),
        )


def conduct(config: RecipeConfig, load: Callable[[], Data], run: type[Run]) -> None:
    """A run from its options to its results: shown, written, and summed up in W&B.

    Args:
        config: the recipe's options.
        load: the data.
        run: the recipe's own.
    """
    try:
        state = build_state(config.method)
        data = load()
        accelerator = open_session(
            project_dir=config.run.output_dir,
            mixed_precision=config.run.mixed_precision,
            accumulate=config.run.accumulate,
            track=config.run.wandb != "disabled",
        )
        training = run(config, state, data, accelerator)
    except (RecipeError, CommHooksError) as error:
        refuse(error)
    try:
        results = training.to_the_end()
    except Stopped as stopped:
        training.keeper.close()
        if state is not None:
            # Nobody uses the model now, but without it the library would say that it was forgotten.
            state.finish()
        accelerator.end_training()
        if accelerator.is_main_process:
            print(stopped, flush=True)
        return
    training.keeper.close()
    training.tracker.summarise(results.headline())
    training.show_model()
    if accelerator.is_main_process:
        show_results(results)
        if config.run.json is not None:
            write_results(results, config.run.json)
    accelerator.end_training()
