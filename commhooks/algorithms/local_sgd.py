"""Local SGD: average the models every tau steps, and wait."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from commhooks.engine.state import CommHookState, EngineOptions
from commhooks.hyperparameters import integer_at_least

__all__ = ["LocalSGD"]


class LocalSGD(CommHookState):
    r"""Local SGD (Stich, ICLR 2019; Yu et al., AAAI 2019; Wang & Joshi, 2018).

    At a boundary, with a blocking all-reduce:

    .. math:: x_i \leftarrow \frac{1}{m} \sum_j x_j

    Extra memory: 1 model. Payload of a round: 1 model. With ``tau=1`` and plain SGD it is DDP.

    Args:
        tau: steps from one averaging to the next.
        **options: ``process_group``, ``warmup_steps`` and ``bucket_cap_mb``, see
            :class:`~commhooks.engine.state.CommHookState`.

    Raises:
        HyperParameterError: an argument has the wrong type or lies outside its range.
    """

    def __init__(self, tau: int, **options: Unpack[EngineOptions]) -> None:
        super().__init__(**options)
        self.tau = integer_at_least("tau", tau, 1)

    def hyperparameters(self) -> dict[str, object]:
        """The hyper-parameters as plain values, by the names the constructor takes."""
        return {"tau": self.tau, **super().hyperparameters()}

    def mix(self, *, x: Tensor, wire: Tensor) -> None:
        """x <- mean."""
        x.copy_(wire)
