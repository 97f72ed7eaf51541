"""What holds for every test: threads, the order, and how long one may take."""

import signal
import threading
from typing import Any

import pytest
import pytest_timeout  # type: ignore[import-untyped]
import torch

from tests.harness import scaled

# As the ranks have, so that the same sums round alike.
torch.set_num_threads(1)

# A shell lets what it runs in the background ignore Ctrl-C, and so would the processes that tests
# start and interrupt.
if threading.current_thread() is threading.main_thread() and (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that at the end no worker is left alone with one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> object:
    """Give every test as much more time as this machine is slower."""
    longer = settings._replace(timeout=scaled(settings.timeout))
    return pytest_timeout.pytest_timeout_set_timer(item, longer)
