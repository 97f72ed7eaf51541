"""Backend threads that are still letting go of a callback when everybody has moved on."""

import time
from collections.abc import Callable
from typing import Any

import torch


class _Callback:
    def __init__(self, call: Callable[[Any], Any]) -> None:
        self.call = call

    def __call__(self, future: Any) -> Any:
        return self.call(future)

    def __del__(self) -> None:
        time.sleep(0.3)


def release_callbacks_late() -> None:
    """In this process and from now on, for every callback chained to a future."""
    then = torch._C.Future.then

    def then_released_late(future: Any, callback: Callable[[Any], Any]) -> Any:
        return then(future, _Callback(callback))

    torch._C.Future.then = then_released_late  # type: ignore[assignment]
