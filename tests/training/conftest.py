"""Tests marked gpu are left out, not skipped, where torch sees no GPU: a skip says that something is missing which CI should have.
After each test its clients of parameter servers are closed."""

from collections.abc import Iterator

import pytest
import torch

from training.parameter_servers import close_clients

_left_out = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        items[:] = [item for item in items if item not in marked]
        config.stash[_left_out] = len(marked)
        config.hook.pytest_deselected(items=marked)


def pytest_report_collectionfinish(config: pytest.Config) -> str:
    count = config.stash.get(_left_out, 0)
    return f"torch sees no GPU here: {count} tests that need one are left out" if count else ""


@pytest.fixture(autouse=True)
def _clients_are_closed() -> Iterator[None]:
    yield
    close_clients()
