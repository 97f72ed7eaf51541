"""DiLoCo: an outer optimizer on what the workers have learnt; blocking, delayed or streaming."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, optim

from commhooks.algorithms.outer import OuterOptimizer, check_outer_state, stepped
from commhooks.engine.rules import Part
from commhooks.engine.state import CommHookState
from commhooks.engine.vectors.chunks import real
from commhooks.errors import RegistrationError
from commhooks.hyperparameters import Count, Fragments, Outer, Tau, Unit, one_of, refusal

__all__ = ["DiLoCo"]

logger = logging.getLogger("commhooks")

_ELEMENTWISE = (
    optim.ASGD,
    optim.Adadelta,
    optim.Adagrad,
    optim.Adam,
    optim.AdamW,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Rprop,
    optim.SGD,
)

_NESTEROV = partial(optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
"""The outer optimizer of the paper."""


@dataclass(eq=False, repr=False)
class DiLoCo(CommHookState):
    r"""DiLoCo (Douillard et al. 2023, arXiv:2311.08105) and Streaming DiLoCo (arXiv:2501.18512).

    At a launch, every ``tau`` steps for every fragment, the workers average how far they have come
    from the global model :math:`z`, the outer gradient,

    .. math:: g \leftarrow \frac{1}{m} \sum_i (z - x_i)

    and while that is in flight the training goes on. When it ends, the outer optimizer makes a step
    on :math:`z` with the gradient :math:`g`. ``delay`` steps after the launch the result lands in
    the models. With ``merge="blend"`` (Streaming DiLoCo, Section 2.3)

    .. math:: x_i \leftarrow \alpha x_i + (1 - \alpha) z

    and with ``merge="carry"``, which keeps what was learnt in flight, from the :math:`s_i = x_i` at
    the launch,

    .. math:: x_i \leftarrow z + (x_i - s_i)

    :math:`z` starts as the parameters at the end of warm-up. With P fragments, fragment p launches
    after steps :math:`\lceil p \tau / P \rceil + k \tau`, so that a link carries 1/P of the model
    at a time.

    Extra memory: z, the wire and the outer optimizer's state, which for the default is 3 models;
    ``merge="carry"`` takes one more. Payload of a round: 1 fragment.

    Args:
        tau: steps from one launch of a fragment to its next. The paper uses 500.
        outer: builds the outer optimizer from a list of parameters, any ``torch.optim`` one. It
            sees each parameter in its own shape.
        fragments: how many parts of the model take turns, near in size; or a list of lists of
            parameter names (shell patterns of names will do).
        delay: steps from a launch to its landing, 0 (the training thread waits) to ``tau``.
        merge: "blend" or "carry".
        alpha: weight of the local model in a blend, in [0, 1]; 0 replaces it.

    Raises:
        HyperParameterError: an argument has the wrong type or lies outside its range.
    """

    tau: Tau
    outer: Outer = _NESTEROV
    fragments: Fragments = 1
    delay: Count = 0
    merge: Literal["blend", "carry"] = "blend"
    alpha: Unit = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("merge", self.merge, ("blend", "carry"))
        if isinstance(self.tau, int) and self.delay > self.tau:
            raise refusal("delay", self.delay, f"at most tau, which is {self.tau}")

    @property
    def vectors(self) -> tuple[str, ...]:
        """The global model z and, to carry on from, the local one at the launch."""
        return ("z", "s") if self.merge == "carry" else ("z",)

    @property
    def reference(self) -> str:
        """The global model."""
        return "z"

    @property
    def weight_of_x(self) -> float:
        """alpha in a blend; all of x is carried on."""
        return 1.0 if self.merge == "carry" else self.alpha

    contributes_differences = True

    @property
    def elementwise(self) -> bool:
        """Whether the outer optimizer is known to treat every number by itself."""
        return type(self.outer([torch.nn.Parameter(torch.zeros(1, 1))])) in _ELEMENTWISE

    def resolve(self, m: int) -> None:
        """Warn of the one setting that learns nothing."""
        if self.merge == "blend" and self.alpha == 0 and self.delay == self.tau:
            logger.warning(
                "commhooks: DiLoCo with delay=tau and alpha=0 replaces each model by z just before "
                "the next launch, so that there is nothing left to average and nothing is learnt. "
                'Take merge="carry", an alpha above 0, or a shorter delay.'
            )

    def fit(self, parameters: Mapping[str, Tensor]) -> None:
        """Build the outer optimizer, and let one like it make a step, to see whether it objects.

        Some object to a shape when they are built, and others to a device, or to a step without a
        closure, when they step.
        """
        shapes: list[Tensor] = [
            torch.nn.Parameter(torch.empty(real(p).shape, device="meta"))
            for p in parameters.values()
        ]
        some = next(iter(parameters.values()))
        try:
            self.outer(shapes)
            stepped(self.outer, torch.zeros(2, 2, device=some.device))
        except Exception as error:
            raise RegistrationError(
                f"The outer optimizer does not take these parameters ({', '.join(parameters)}): "
                f"{error}"
            ) from error

    def start(self, *, x: Tensor, wire: Tensor, z: Tensor, s: Tensor | None = None) -> None:
        """z <- x."""
        z.copy_(x)

    def keep(self, parts: Sequence[Part]) -> OuterOptimizer:
        """The outer optimizer of a fragment."""
        return OuterOptimizer(self.outer, parts)

    def check_kept(self, parts: Sequence[Tensor], saved: object, *, launched: bool) -> None:
        """Compare with the state of such an optimizer."""
        check_outer_state(self.outer, parts, saved, launched=launched)

    def contribute(self, *, x: Tensor, wire: Tensor, z: Tensor, s: Tensor | None = None) -> None:
        """The mean is that of z - x; s <- x."""
        torch.sub(z, x, out=wire)
        if s is not None:
            s.copy_(x)

    def arrive(self, kept: OuterOptimizer) -> None:
        """A step of the outer optimizer on z."""
        kept.step()

    def mix(self, *, x: Tensor, wire: Tensor, z: Tensor, s: Tensor | None = None) -> None:
        """x <- alpha x + (1 - alpha) z, or x <- z + (x - s)."""
        if s is not None:
            x.add_(torch.sub(z, s, out=wire))
        elif self.alpha == 0:
            x.copy_(z)
        else:
            x.lerp_(z, 1 - self.alpha)
