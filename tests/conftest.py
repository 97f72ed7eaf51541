"""What holds for every test: one thread, as the ranks have, so that the same sums round alike."""

from typing import Any

import pytest
import pytest_timeout  # type: ignore[import-untyped]
import torch

from tests.harness import scaled

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> object:
    """Give every test as much more time as this machine is slower."""
    longer = settings._replace(timeout=scaled(settings.timeout))
    return pytest_timeout.pytest_timeout_set_timer(item, longer)
