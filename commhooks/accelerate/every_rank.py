"""What Accelerate's ``save_state`` and ``load_state`` do besides, on every rank."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commhooks.accelerate import foreign_files, rank_files
from commhooks.errors import CheckpointError, RegistrationError, RoundError
from commhooks.together import by_rank, described, gathered

if TYPE_CHECKING:
    from accelerate import Accelerator

    from commhooks.engine.state import CommHookState

__all__ = ["EveryRank"]

logger = logging.getLogger("commhooks")

T = TypeVar("T")


class EveryRank:
    """The states of one accelerator, and what their ranks save and load.

    Saving: a hook in front of the script's own writes this rank's files and enters the consensus
    model, in which the script's hooks and Accelerate then write theirs; it is left when
    ``save_state`` returns or raises.

    Loading: a hook in front of the script's own looks at every file before any is loaded. This
    rank's own values are put in place when all others are through, since Accelerate and the
    script give those of rank 0 to everybody.

    Args:
        accelerator: whose methods are to do so from now on.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._members: list[_Member] = []
        self._consensus = ExitStack()
        self._written: list[Any] | None = None
        self._found: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None
        # Of the call under way: whether a failure is known to all ranks, and whether this one has
        # taken part in averaged().
        self._known = False
        self._entered = False
        before_save = accelerator.register_save_state_pre_hook(self._before_save)
        before_load = accelerator.register_load_state_pre_hook(self._before_load)
        # The script's own hooks may empty the lists they are given, and load models.
        accelerator._save_model_state_pre_hook.move_to_end(before_save.id, last=False)
        accelerator._load_model_state_pre_hook.move_to_end(before_load.id, last=False)
        # It gets a file of its own, custom_checkpoint_N.pkl, written when the hooks are through.
        accelerator.register_for_checkpointing(self)
        # A hook after everything else, and one that runs after an error, Accelerate does not have.
        accelerator.save_state = self._wrapped(
            accelerator.save_state, self._after_save, self._miss_save
        )
        accelerator.load_state = self._wrapped(accelerator.load_state, self._after_load)

    def add(self, state: CommHookState) -> None:
        """Keep one more state. Collective.

        Raises:
            RegistrationError: it is there already, its model cannot be found, or it is another one
                than on the other ranks.
        """
        if any(member.state is state for member in self._members):
            raise RegistrationError(
                "This accelerator checkpoints this state already; call "
                "commhooks.accelerate.checkpoint once for every state."
            )
        member = _Member(state, self._model_of(state))
        # Now, since ranks that save their states in different orders would wait for each other.
        found = gathered(member.description)
        if any(each != found[0] for each in found):
            listed = "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(found))
            raise RegistrationError(
                "The ranks gave commhooks.accelerate.checkpoint other states, or in another "
                f"order: {listed}. Call it in the same order on every rank."
            )
        self._members.append(member)

    def _model_of(self, state: CommHookState) -> nn.Module:
        model = state.model
        if isinstance(model, DistributedDataParallel):
            module: nn.Module = model.module
            return module
        if model is not None:
            raise RegistrationError(
                "commhooks.accelerate.checkpoint is for DDP models; save a model of fully_shard "
                "with torch.distributed.checkpoint, and state.state_dict() on every rank."
            )
        # Registered by the bare form, and its first forward is still to come.
        taken = [member.model for member in self._members]
        models: list[nn.Module] = self._accelerator._models
        left = [m for m in models if not any(m is other for other in taken)]
        if len(left) != 1:
            raise RegistrationError(
                f"commhooks.accelerate.checkpoint found {len(left)} models that {state!r} may be "
                "registered on. Call it after state.register(model, optimizer), where model is "
                "what accelerator.prepare returned."
            )
        (model,) = left
        return model

    @property
    def _rank(self) -> int:
        return int(self._accelerator.process_index)

    @property
    def _size(self) -> int:
        return int(self._accelerator.num_processes)

    # Failing together.

    def _wrapped(
        self,
        method: Callable[..., T],
        after: Callable[[bool], None],
        catch_up: Callable[[], None] = lambda: None,
    ) -> Callable[..., T]:
        """A method of Accelerate's that raises on every rank if it fails on one of them.

        Args:
            method: Accelerate's own.
            after: called behind it with whether it has succeeded.
            catch_up: called after an error that the other ranks do not know of, for the
                collectives that they are about to start before they hear of it.
        """

        @functools.wraps(method)
        def on_every_rank(*args: Any, **kwargs: Any) -> T:
            self._known = self._entered = False
            try:
                try:
                    result = method(*args, **kwargs)
                except BaseException:
                    after(False)
                    raise
                after(True)
            except RoundError:
                # Every rank has it, and the ranks may no longer reach each other.
                raise
            except Exception as error:
                if not self._known:
                    catch_up()
                    self._meet(described(error))
                raise
            reasons = [problem for problem, _ in self._meet(None)]
            if any(reasons):
                raise CheckpointError(
                    f"Accelerate's {method.__name__} failed on some rank: {by_rank(reasons)}"
                )
            return result

        return on_every_rank

    def _meet(self, problem: str | None, facts: Any = None) -> list[tuple[str | None, Any]]:
        """Tell the other ranks how it went here, and hear how it went there."""
        met = gathered((problem, facts))
        self._known = any(reason for reason, _ in met)
        return met

    def _refuse_if_any(self, met: list[tuple[str | None, Any]]) -> None:
        problems = by_rank([problem for problem, _ in met])
        if problems:
            raise CheckpointError(problems[0].upper() + problems[1:])

    # Saving.

    def _before_save(self, models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        """Accelerate's hook before it writes ``weights``, one dictionary a model."""
        folder = Path(output_dir)
        own, problem = None, None
        try:
            own = self._own()
        except RoundError:
            raise
        except Exception as error:  # noqa: BLE001 - raised on every rank
            problem = described(error)
        # The first collective is the library's: if save_state was called on the main process
        # alone, it is an error on every rank, where others would wait. The tensors in ``weights``
        # are the models' own, so that they hold the consensus too.
        self._enter_consensus()
        if own is not None:
            try:
                self._write(*own, folder)
            except Exception as error:  # noqa: BLE001 - raised on every rank
                problem = described(error)
        self._refuse_if_any(self._meet(problem))
        if self._accelerator.is_local_main_process:
            rank_files.remove_others(folder, self._size)
        self._written = weights

    def _write(self, values: Mapping[str, Any], objects: Mapping[str, Any], folder: Path) -> None:
        rank_files.write(values, folder / rank_files.rank_file(self._rank, self._size))
        rank_files.write(objects, folder / rank_files.objects_file(self._rank, self._size))

    def _enter_consensus(self) -> None:
        self._entered = True
        for member in self._members:
            self._consensus.enter_context(member.state.averaged())

    def _own(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What this rank has: tensors and plain values, and objects."""
        accelerator = self._accelerator
        scaler = accelerator.scaler
        values = {
            "world_size": self._size,
            "steps": [member.state.stats.step for member in self._members],
            "states": [member.state.state_dict() for member in self._members],
            # Copies: it is written when the consensus model is in their place.
            "models": [_copied(member.model.state_dict()) for member in self._members],
            "optimizers": [each.state_dict() for each in accelerator._optimizers],
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        objects = {
            "schedulers": [each.state_dict() for each in accelerator._schedulers],
            "objects": [each.state_dict() for each in self._others],
        }
        return values, objects

    def state_dict(self) -> dict[str, Any]:
        """What Accelerate writes for this object: how many models it has written itself."""
        if self._written is None:
            raise CheckpointError("Use accelerator.save_state to save a checkpoint.")
        return {
            "format": rank_files.FORMAT,
            "world_size": self._size,
            "models": len(self._written),
        }

    def _after_save(self, succeeded: bool) -> None:
        self._written = None
        self._consensus.close()

    def _miss_save(self) -> None:
        """Do as the other ranks do, which go on to the hook that this one has not reached."""
        if not self._entered:
            self._enter_consensus()
            self._consensus.close()

    # Loading.

    def _before_load(self, models: list[nn.Module], input_dir: str) -> None:
        """Accelerate's hook before it loads anything: refuse now, or not at all."""
        problem, steps = None, None
        try:
            self._found = self._checked(models, Path(input_dir))
            steps = self._found[0]["steps"]
        except Exception as error:  # noqa: BLE001 - raised on every rank
            problem = described(error)
        met = self._meet(problem, steps)
        self._refuse_if_any(met)
        everyone = [steps for _, steps in met]
        if any(steps != everyone[0] for steps in everyone):
            self._known = True
            numbers = [steps[0] if len(steps) == 1 else steps for steps in everyone]
            raise CheckpointError(
                f"{input_dir} holds the ranks at different steps, {numbers}: saving it again was "
                "cut short. commhooks.checkpoints.Checkpoints never leaves such a folder."
            )

    def _checked(
        self, models: list[nn.Module], folder: Path
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """This rank's part of the checkpoint.

        On another number of ranks rank 0's, but for the states, which are of a rank that was at the
        same place of its island.
        """
        sizes = rank_files.saved_sizes(folder)
        if not sizes:
            raise CheckpointError(
                f"{folder} holds no {rank_files.rank_file(self._rank, self._size)}; it was not "
                "saved with commhooks.accelerate.checkpoint."
            )
        same_ranks = self._size in sizes
        rank, size = (self._rank, self._size) if same_ranks else (0, max(sizes))
        path = folder / rank_files.rank_file(rank, size)
        saved = rank_files.read(path)
        others = rank_files.read(folder / rank_files.objects_file(rank, size), weights_only=False)
        alike = rank if same_ranks else self._rank % size
        if alike != rank:
            of_alike = rank_files.read(folder / rank_files.rank_file(alike, size))
            saved = {**saved, **{name: of_alike[name] for name in ("steps", "states")}}
        accelerator = self._accelerator
        _check_numbers(
            path.name,
            {
                "states": (len(saved["states"]), len(self._members)),
                "optimizers": (len(saved["optimizers"]), len(accelerator._optimizers)),
                "schedulers": (len(others["schedulers"]), len(accelerator._schedulers)),
                "registered objects": (len(others["objects"]), len(self._others)),
            },
        )
        for member, values in zip(self._members, saved["states"], strict=True):
            member.state.check_state_dict(values)
        for member, values in zip(self._members, saved["models"], strict=True):
            foreign_files.check_shapes(foreign_files.shapes(values), member.model, path)
        mark = foreign_files.load(folder / f"custom_checkpoint_{self._number}.pkl")
        foreign_files.check(
            accelerator, models, folder, model_files=mark["models"], same_ranks=same_ranks
        )
        return saved, others

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """What Accelerate gives back of :meth:`state_dict`, which has been looked at before."""

    def _after_load(self, succeeded: bool) -> None:
        found, self._found = self._found, None
        if not succeeded:
            return
        if found is None:
            raise CheckpointError("Accelerate did not call the hooks that come before loading.")
        saved, others = found
        if saved["world_size"] == self._size:
            self._restore(saved, others)
        else:
            self._start_from_consensus(saved)

    def _restore(self, saved: Mapping[str, Any], others: Mapping[str, Any]) -> None:
        accelerator = self._accelerator
        for member, parameters in zip(self._members, saved["models"], strict=True):
            member.model.load_state_dict(parameters)
        for optimizer, values in zip(accelerator._optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        for scheduler, values in zip(accelerator._schedulers, others["schedulers"], strict=True):
            scheduler.load_state_dict(values)
        for each, values in zip(self._others, others["objects"], strict=True):
            each.load_state_dict(values)
        if accelerator.scaler is not None and saved["scaler"] is not None:
            accelerator.scaler.load_state_dict(saved["scaler"])
        for member, values in zip(self._members, saved["states"], strict=True):
            member.state.load_state_dict(values)

    def _start_from_consensus(self, saved: Mapping[str, Any]) -> None:
        """Accelerate has loaded the consensus model; it cannot know that the rest does not fit."""
        trained = {
            id(parameter) for member in self._members for parameter in member.model.parameters()
        }
        reset = [
            optimizer
            for optimizer in self._accelerator._optimizers
            if any(id(p) in trained for group in optimizer.param_groups for p in group["params"])
        ]
        for optimizer in reset:
            # Hyper-parameters such as the learning rate are every rank's; momenta were rank 0's.
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
        for member, values in zip(self._members, saved["states"], strict=True):
            member.state.load_state_dict(values)
        if self._rank == 0:
            logger.warning(
                "commhooks: the checkpoint is of %s ranks, this run has %s. Every rank starts from "
                "the consensus model; the state of %s optimizer(s) was reset, their "
                "hyper-parameters, the schedulers, the GradScaler and %s object(s) given to "
                "register_for_checkpointing are those of rank 0.",
                saved["world_size"],
                self._size,
                len(reset),
                len(self._others),
            )

    # What else Accelerate was given to checkpoint.

    @property
    def _others(self) -> list[Any]:
        return [each for each in self._accelerator._custom_objects if each is not self]

    @property
    def _number(self) -> int:
        objects = self._accelerator._custom_objects
        return next(number for number, each in enumerate(objects) if each is self)


class _Member:
    """A state and its model, which is not kept alive for the checkpoints' sake."""

    def __init__(self, state: CommHookState, model: nn.Module) -> None:
        self.state = state
        self._model = weakref.ref(model)

    @property
    def model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise CheckpointError(f"The model of {self.state!r} is gone.")
        return model

    @property
    def description(self) -> str:
        """Equal on two ranks only for states of one kind on models of the same shapes."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return f"{self.state!r} on {count} parameters"


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in values.items()
    }


def _check_numbers(name: str, numbers: Mapping[str, tuple[int, int]]) -> None:
    for what, (found, here) in numbers.items():
        if found != here:
            raise CheckpointError(f"{name} has {found} {what}, this run {here}.")
