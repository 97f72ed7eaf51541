"""What everybody else sends while steps are local, and makes the workers wait for by it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator

import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from commhooks.engine.network.communicator import PREFIX
from commhooks.engine.network.islands import Layout

__all__ = ["Others"]

logger = logging.getLogger("commhooks")

# A collective makes the workers wait for the slowest step since the last one. docs/frameworks.md
# has what that costs: with one in ten steps still a third of the time.
_STEPS = 20
_OFTEN = _STEPS // 10


class Others:
    """Counts the collectives that are not the library's, on the groups that join workers.

    torch numbers the collectives of every group, those of DDP's C++ code included. So a step costs
    one look at each group, and nothing is intercepted. What the library sends has groups of its
    own, except for what it asks at registration, in ``averaged()`` and in ``finish()``; these are
    passed over along with what else happens there, such as an evaluation.

    Args:
        layout: which ranks make one worker. A group inside an island makes no other worker wait.
        speaks: whether this rank says what holds for all of them.

    Attributes:
        counted: collectives so far, between one local step and the next.
        model: finds the model, whose options may be a cause.
        optimizer: the name of an optimizer whose step makes some of them, if one does.
    """

    def __init__(self, layout: Layout, *, speaks: bool) -> None:
        self.counted = 0
        self.model: Callable[[], nn.Module | None] = lambda: None
        self.optimizer: str | None = None
        self._islands = [set(island) for island in layout.islands]
        self._speaks = speaks
        self._joins: dict[str, bool] = {}
        self._before: int | None = None
        self._first = True
        # Of the last few steps.
        self._steps = self._busy = self._recent = 0

    def started(self) -> int:
        """All collectives so far, the library's on the user's groups included."""
        return sum(
            _number(group)
            for group in tuple(distributed_c10d._world.pg_map)
            if self._is_watched(group)
        )

    def _is_watched(self, group: dist.ProcessGroup) -> bool:
        name = group.group_name
        watched = self._joins.get(name)
        if watched is None:
            own = name.startswith(PREFIX) or group.group_desc.startswith(PREFIX)
            watched = self._joins[name] = not own and self._joins_workers(group)
        return watched

    def _joins_workers(self, group: dist.ProcessGroup) -> bool:
        try:
            _number(group)
        except RuntimeError:
            # A backend that does not count.
            return False
        ranks = set(dist.get_process_group_ranks(group))
        return sum(not ranks.isdisjoint(island) for island in self._islands) > 1

    def pass_over(self) -> None:
        """Do not count what has been sent since the last step."""
        self._before = None

    def stepped(self, *, local: bool) -> None:
        """A step was made; say it once if others communicate again and again."""
        if len(self._islands) == 1:
            return
        # Join tells the ranks that are out of batches of every forward, which nobody waits for.
        model = self.model()
        joined = getattr(getattr(model, "_join_config", None), "enable", False)
        # Behind its first step DDP rebuilds its buckets, and the ranks tell one another how.
        if not local or joined or self._first:
            self._first = False
            self.pass_over()
            return
        now = self.started()
        # A group may have been destroyed, and its number gone with it.
        new = max(0, now - self._before) if self._before is not None else 0
        if self._before is not None:
            self.counted += new
            self._recent += new
            self._busy += new > 0
            self._steps += 1
        self._before = now
        if self._steps == _STEPS:
            if self._busy >= _OFTEN and self._speaks:
                self._say(model)
                self._speaks = False
            self._steps = self._busy = self._recent = 0

    def _say(self, model: nn.Module | None) -> None:
        logger.warning(
            "commhooks: the workers wait for one another outside commhooks: in %d of the last %d "
            "local steps something else started collectives on their process groups, %.3g a step. "
            "What may do it here: %s. docs/frameworks.md has a remedy for each.",
            self._busy,
            _STEPS,
            self._recent / _STEPS,
            "; ".join(self._causes(model)),
        )

    def _causes(self, model: nn.Module | None) -> Iterator[str]:
        if self.optimizer is not None:
            yield f"{self.optimizer}.step(), or its closure, communicates"
        if getattr(model, "find_unused_parameters", False):
            yield "find_unused_parameters=True of DistributedDataParallel"
        if model is not None and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
            yield "SyncBatchNorm in the model"
        if _dispatches():
            yield (
                "Accelerate reads every batch on rank 0 and broadcasts it, as it does with an "
                "IterableDataset; set DataLoaderConfiguration(dispatch_batches=False, "
                "split_batches=...) with split_batches as it is now"
            )
        for module, cause in _KNOWN.items():
            if module in sys.modules:
                yield cause
        yield "a loss, a metric or a gradient's norm that is reduced or gathered at every step"


def _number(group: dist.ProcessGroup) -> int:
    """How many collectives of a group have been started."""
    number: int = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return number


def _dispatches() -> bool:
    """Whether the loop runs over a DataLoader of Accelerate's that rank 0 reads for all."""
    state, data = (sys.modules.get(f"accelerate.{name}") for name in ("state", "data_loader"))
    if state is None or data is None:
        return False
    return isinstance(state.GradientState().active_dataloader, data.DataLoaderDispatcher)


_KNOWN = {
    "lightning.pytorch": "Lightning asks for SIGTERM before every batch, unless the callback "
    "commhooks.lightning.Consensus is used, and self.log(..., sync_dist=True) in training_step",
    "pytorch_lightning": "pytorch_lightning asks for SIGTERM before every batch",
    "transformers.trainer": "transformers' Trainer gathers the loss at every logged step, unless "
    "it is commhooks.transformers.ConsensusTrainer, and tokens with include_num_input_tokens_seen",
    "torchmetrics": "a metric of torchmetrics with dist_sync_on_step=True",
    "deepspeed": "DeepSpeed",
}
"""What is known to communicate at every step, by the module that is imported then."""
