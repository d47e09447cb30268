"""Tests marked gpu are left out, not skipped, where torch sees no GPU: a skip says that something is missing which CI should have."""

import pytest
import torch

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
