"""How algorithms look, the same in every picture, and apart without colour."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from comparison.grid import Method

__all__ = ["FONT_SIZE", "Look", "looks"]

# Points; pictures are made as wide as they are shown in print, one or two columns.
FONT_SIZE = 8

_Dashes = str | tuple[int, tuple[float, ...]]


@dataclass(frozen=True)
class Look:
    """One method's colour, dashes, marker and hatch."""

    color: str
    dashes: _Dashes
    marker: str
    hollow: bool

    def line(self) -> dict[str, Any]:
        """Keywords of a line with markers."""
        return {
            "color": self.color,
            "linestyle": self.dashes,
            "linewidth": 1.1,
            "marker": self.marker,
            "markersize": 3.5,
            "markerfacecolor": "white" if self.hollow else self.color,
            "markeredgewidth": 0.8,
        }


# Okabe and Ito's colours, which differ in lightness as well.
_LOOKS: dict[str, tuple[str, _Dashes, str]] = {
    "ddp": ("#000000", "-", "x"),
    "all-reduce": ("#000000", "-", "x"),
    "local-sgd": ("#E69F00", (0, (4, 1.5)), "s"),
    "overlap-local-sgd": ("#0072B2", "-", "o"),
    "easgd": ("#D55E00", (0, (5, 1, 1, 1)), "^"),
    "cocod-sgd": ("#009E73", (0, (1, 1)), "D"),
    "bmuf": ("#CC79A7", (0, (5, 1, 1, 1, 1, 1)), "v"),
    "diloco": ("#56B4E9", "-", "P"),
    "slowmo": ("#882255", (0, (3, 1, 1, 1)), "p"),
}
_VARIANT_DASHES: tuple[_Dashes, ...] = (
    "-",
    (0, (2.5, 1)),
    (0, (1, 1.5)),
    (0, (6, 2)),
    (0, (7, 1, 1, 1)),
)
# From the third variant on; hollow ones are between them.
_VARIANT_MARKERS = ("*", "d", "H")
_DARKER = 0.55


def looks(methods: Iterable[Method]) -> dict[Method, Look]:
    """A look for each method; a second one of the same algorithm has hollow markers, dashed.

    Each further pair of them is darker, with markers of its own. Methods that have names are mostly
    variants of one algorithm, and have the looks of all algorithms in turn.
    """
    found: dict[Method, Look] = {}
    for method in dict.fromkeys(methods):
        if method.name is not None:
            found[method] = _next_look(sum(other.name is not None for other in found))
            continue
        color, dashes, marker = _LOOKS[method.algorithm]
        variant = sum(other.algorithm == method.algorithm for other in found)
        if variant:
            dashes = _VARIANT_DASHES[variant % len(_VARIANT_DASHES)]
        if variant > 1:
            marker = _VARIANT_MARKERS[(variant // 2 - 1) % len(_VARIANT_MARKERS)]
        found[method] = Look(_darker(color, variant // 2), dashes, marker, hollow=variant % 2 == 1)
    return found


def _next_look(number: int) -> Look:
    """Look ``number`` of those that are not black; dashed and hollow where they begin again."""
    colored = [look for look in _LOOKS.values() if look[0] != "#000000"]
    again, place = divmod(number, len(colored))
    color, dashes, marker = colored[place]
    dashes = _VARIANT_DASHES[again % len(_VARIANT_DASHES)] if again else dashes
    return Look(_darker(color, again), dashes, marker, hollow=again % 2 == 1)


def _darker(color: str, times: int) -> str:
    """A colour written as #RRGGBB, darker by so many shades."""
    parts = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(part * _DARKER**times):02X}" for part in parts)
