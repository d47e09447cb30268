"""Tests marked gpu are left out, not skipped, where torch sees no GPU: a skip says that something is missing which CI should have.
After each test its clients of parameter servers are closed."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from training.job import Model, trained
from training.mesh_ranks import MeshRanks
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


@pytest.fixture(scope="module")
def ranks() -> Iterator[MeshRanks]:
    """Processes for the cases of a module, each with one thread, as the test itself has then."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    started = MeshRanks()
    yield started
    started.close()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """The models of trainings that nothing disturbs (`job.trained`), each of which is trained once for all cases of a module."""
    known = dict[str, Model]()

    def of(spec: dict[str, Any], **options: Any) -> Model:
        key = json.dumps([spec, options], sort_keys=True)
        if key not in known:
            known[key] = trained(tmp_path_factory.mktemp("calm"), spec, **options)
        return known[key]

    return of
