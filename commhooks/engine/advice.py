"""What the log says once, where a run could do better than it does."""

from __future__ import annotations

import logging
import math
import sys
import weakref
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from commhooks.engine.steps.own_model import OwnModelWatch
from commhooks.engine.vectors.frozen import Unlike, named
from commhooks.stats import Stats

__all__ = ["Advice"]

logger = logging.getLogger("commhooks")

# A round in flight makes steps a little longer, and clocks differ; this much is none of those.
_EXPOSED = 0.2
# So many rounds in a row.
_ROUNDS = 5
# Beyond it, averaging models is averaging different ones (docs/worse.md has what was measured).
_DRIFT = 0.5


class _Call(Protocol):
    @property
    def failed(self) -> bool: ...


# What is asked of who takes this rank's own model for the result.
_SAVED = (
    "model.state_dict() was called outside averaged(), which gives this rank's own "
    "model and not the consensus. To save the result, write on all ranks: with state.averaged(): "
    "save(model). To save a run that is to go on, call state.state_dict() at the same step, on "
    "every rank."
)


@dataclass
class _Open:
    """What is open between two steps.

    Attributes:
        algorithm: its name.
        speaks: whether this rank says what all of them find.
        apart: whether the ranks' models differ, and nothing has made them one for good.
        inside: whether this is inside ``averaged()``.
        read: whether this rank's own model was read as if to save it.
        checkpointed: whether that was for a checkpoint: the state was saved or loaded at this step,
            or the model loaded.
    """

    algorithm: str
    speaks: bool
    apart: bool = False
    inside: bool = False
    read: bool = False
    checkpointed: bool = False


def _remind(run: _Open, call: _Call) -> None:
    """The state is gone, or the process ends."""
    # Who ends with an error has been told something else already.
    if not run.apart or call.failed or hasattr(sys, "last_value"):
        return
    if run.read and not run.checkpointed and run.speaks:
        logger.warning("commhooks: %s", _SAVED)
    logger.warning(
        "commhooks: %s made local steps after the last finish(), so that every rank ends with a "
        "model of its own. What was saved inside averaged(), and a checkpoint to go on from, are "
        "as they should be. If the model is to be used or saved now, call state.finish() on all "
        "ranks before.",
        run.algorithm,
    )


class Advice:
    """Looks at a run as it goes, and says each thing once.

    Args:
        owner: whose run it is; when it is gone, the run is over.
        algorithm: its name.
        call: knows whether a round has failed.
        delay: steps from a launch to its landing, 0 if rounds are waited for; None for tau.
        adapts: whether tau is made to fit by itself.
        speaks: whether this rank says what all of them find.
    """

    def __init__(
        self,
        owner: object,
        algorithm: str,
        call: _Call,
        delay: int | None,
        *,
        adapts: bool,
        speaks: bool,
    ) -> None:
        self._adapts = adapts
        self._delay = delay
        self._said: set[str] = set()
        self._exposed = 0.0
        self._late = self._far = 0
        self._run = _Open(algorithm, speaks)
        self._own_model: OwnModelWatch | None = None
        weakref.finalize(owner, _remind, self._run, call)

    def watch(self, module: nn.Module) -> None:
        """See to it that nobody takes this rank's own ``module`` for the result."""
        self._own_model = OwnModelWatch(module, self.evaluated, self._read)

    def close(self) -> None:
        """Look no longer."""
        if self._own_model is not None:
            self._own_model.close()

    def stepped(self, *, local: bool) -> None:
        """A step was made."""
        self._between_steps()
        self._run.apart |= local
        self._look()

    def averaged(self, *, inside: bool) -> None:
        """The consensus model was put in place, or this rank's own was put back."""
        self._run.inside = inside
        self._look()

    def together(self) -> None:
        """Every rank goes on from the consensus model, or ends with it."""
        self._between_steps()
        self._run.apart = self._run.inside = False
        self._look()

    def forward(self) -> None:
        """A forward of the DDP model begins, which calls the module within."""
        if self._own_model is not None:
            self._own_model.look(False)

    def unlike(self, found: Unlike) -> None:
        """Frozen parameters that were not the same on all ranks, in the consensus model."""
        if found.bits:
            self._say(
                "frozen",
                f"the ranks have different frozen parameters: {named(found.bits)}. In the "
                "consensus model they are the means, and the first rank's where they are no "
                "floating-point numbers, as is right for what the loop writes, such as an EMA "
                "teacher. A base must be the same on every rank: load it before "
                "DistributedDataParallel. To leave each rank its own, name them in "
                "module._ddp_params_and_buffers_to_ignore before that.",
            )
        if found.kinds:
            self._say(
                "frozen of other kinds",
                f"frozen parameters have another shape or format, or are missing, on some ranks: "
                f"{named(found.kinds)}. Each rank keeps its own in the consensus model. Make them "
                "alike on all ranks.",
            )

    def evaluated(self) -> None:
        """A forward without gradients, of a model in evaluation mode, on this rank's own model."""
        if self._run.apart:
            self._say(
                "evaluated",
                "the model is evaluated outside averaged(), which is this rank's own model and not "
                "the consensus. Write, on all ranks: with state.averaged(): evaluate(model)",
            )

    def overwritten(self) -> None:
        """A round is launched from parameters that somebody else has written."""
        self._say(
            "overwritten",
            "the model's parameters were loaded or written to in the middle of a run, and "
            f"{self._run.algorithm} still draws them to where they were before. After "
            "model.load_state_dict call state.load_state_dict to go on from a checkpoint. For all "
            "else call state.finish() on all ranks, right before or after the parameters are "
            "written, so that the algorithm begins anew from them.",
            alone=True,
        )

    def apart(self) -> None:
        """The models differed where no local step was known of."""
        self._say(
            "apart",
            f"the ranks' models were not the same, though {self._run.algorithm} had counted no "
            "local step: something updates them on each rank by itself. They were averaged. Call "
            "ddp_model(x) and loss.backward() once a step, and let optimizers step behind it.",
        )

    def no_common_start(self) -> None:
        """The ranks were given the first one's parameters."""
        self._say(
            "start",
            "the ranks began the local steps with different parameters, and were given those of "
            "the first rank. Write to parameters before the model is wrapped in "
            "DistributedDataParallel, or on all ranks alike (the same seed, the same checkpoint); "
            "in warm-up call loss.backward() once a forward, and let optimizers step behind it.",
        )

    def checkpointed(self) -> None:
        """The state was saved or loaded, or the model loaded."""
        self._run.checkpointed = True

    def _read(self) -> None:
        """The model's parameters were asked for, or it was copied."""
        self._run.read |= self._run.apart and not self._run.inside

    def _between_steps(self) -> None:
        """All that was read at a step has been, and in any order."""
        if self._run.read and not self._run.checkpointed:
            self._say("saved", _SAVED)
        self._run.read = self._run.checkpointed = False

    def _look(self) -> None:
        if self._own_model is not None:
            self._own_model.look(self._run.apart and not self._run.inside)

    def landed(self, stats: Stats) -> None:
        """A round has landed; ``stats`` are the same on every rank."""
        waited, self._exposed = stats.seconds_exposed - self._exposed, stats.seconds_exposed
        if self._delay != 0:
            self._look_at_times(waited, stats)
        self._far = self._far + 1 if stats.relative_drift > _DRIFT else 0
        if self._far == _ROUNDS:
            self._say(
                "drift",
                f"the workers' models are {stats.relative_drift:.2f} times their own size apart "
                f"when they are averaged, after {stats.tau} steps. Take a smaller tau or a lower "
                "learning rate; state.drift() names the parameters.",
            )

    def compared(self, loss: float | None) -> None:
        """A round has landed whose mean loss chooses tau by its ratio to the first one."""
        if loss is None or loss <= 0:
            told = "no finite loss" if loss is None else f"a mean loss of {loss:.3g}"
            self._say(
                "loss",
                f"AdaComm was told {told} in a round. It compares losses by their ratio and needs "
                "some that are finite and above 0: call state.observe(loss) after each backward, "
                "with a constant added if the loss can be below 0.",
            )

    def _look_at_times(self, waited: float, stats: Stats) -> None:
        steps = stats.tau if self._delay is None else self._delay
        cover = steps * stats.step_seconds
        late = waited > _EXPOSED * stats.tau * stats.step_seconds > 0
        self._late = self._late + 1 if late else 0
        if self._late < _ROUNDS:
            return
        if stats.round_seconds > cover:
            if self._adapts:
                return
            needed = math.ceil(1.2 * stats.round_seconds / stats.step_seconds)
            name = "tau" if self._delay is None else "delay"
            self._say(
                "exposed",
                f"communication is not hidden: a round takes {stats.round_seconds:.3g} s, and the "
                f"{steps} steps that should hide it take {cover:.3g} s. A {name} of {needed} would "
                'hide it, or fewer bits a number (compression); tau="auto" finds tau by itself.',
            )
        else:
            self._say(
                "uneven",
                f"ranks wait for one another although a round takes {stats.round_seconds:.3g} s "
                f"and the steps that hide it {cover:.3g} s: some rank is slower than the others, "
                "or stops now and then.",
            )

    def _say(self, what: str, text: str, *, alone: bool = False) -> None:
        """Say it once: on the first rank, or on each that finds it ``alone``."""
        if what not in self._said and (self._run.speaks or alone):
            logger.warning("commhooks: %s", text)
        self._said.add(what)
