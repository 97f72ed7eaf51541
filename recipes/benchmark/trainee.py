"""A contender at work on a load of its own."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from benchmark.contenders import Attached, Contender
from benchmark.loads import Load
from commhooks import CommHookState

__all__ = ["Trainee", "trained"]

_ONE_BUCKET_MB = 100_000


class Trainee:
    """A model that a contender trains, step by step.

    Args:
        load: what is trained.
        model: its model, wrapped.
        optimizer: of the model.
        attached: the contender.
    """

    def __init__(
        self,
        load: Load,
        model: DistributedDataParallel,
        optimizer: Optimizer,
        attached: Attached,
    ) -> None:
        self.load = load
        self._model = model
        self._optimizer = optimizer
        self._attached = attached

    @property
    def state(self) -> CommHookState | None:
        """Ours, if the contender is one of ours."""
        return self._attached.state

    @property
    def parameter_bytes(self) -> int:
        """Size of the model's parameters."""
        return sum(p.numel() * p.element_size() for p in self._model.parameters())

    def step(self) -> None:
        """One step of training."""
        self.load.loss(self._model(self.load.batch)).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        # Before zero_grad, since torch's averager takes no parameter that has no gradient.
        self._attached.after_step()
        self._optimizer.zero_grad()


@contextmanager
def trained(contender: Contender, load: Load, tau: int) -> Iterator[Trainee]:
    """``load``, trained by ``contender`` inside the block; every rank enters and leaves it."""
    # Nobody needs the first broadcast, since all ranks build the same model. And buffers are
    # broadcast by none, for else the baseline would communicate.
    model = DistributedDataParallel(
        load.model,
        init_sync=False,
        forward_sync_buffers=False,
        bucket_cap_mb=_ONE_BUCKET_MB if contender.one_bucket else None,
    )
    optimizer = SGD(model.parameters(), lr=1e-3)
    with ExitStack() as stack:
        attached = contender.attach(model, optimizer, tau, stack)
        yield Trainee(load, model, optimizer, attached)
        if attached.state is not None:
            # Waits for what is in flight, so that the next state can have the groups of this one.
            attached.state.state_dict()
