"""What gloo says when a rank is gone, in words for people."""

from __future__ import annotations

import re

__all__ = ["plain"]

# Behind it may come advice that is torch's, and lines of a stack.
_GLOO = re.compile(
    r"(?:Got the following error when running the callback: )?(?:\w+Error: )?"
    r"\[[^\]\s]*gloo[^\]]*\] ?(?P<words>.*?)(?: This is typically.*)?(?:\n.*)?$",
    re.DOTALL,
)

_REASONS = {
    "Connection (?:closed|reset) by peer|Connection refused|Broken pipe|Socket closed": (
        "another rank has left: its process has ended or crashed, or the network is cut. Its own "
        "log says why"
    ),
    "Timed out": "another rank did not come within the timeout of the process group",
}


def plain(cause: str) -> str:
    """``cause`` with what gloo says in it said in plain words, and gloo's own behind them."""
    found = _GLOO.search(cause)
    if found is None:
        return cause
    said = found["words"].strip().rstrip(".")
    for pattern, reason in _REASONS.items():
        if re.search(pattern, said):
            return f"{cause[: found.start()]}{reason} (gloo: {said})."
    return cause
