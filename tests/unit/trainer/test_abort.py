"""When a round ends, every group that ends no wait by itself is aborted, whatever other groups the round has."""

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from disttrain_trainer.parallel import abort, backend
from disttrain_trainer.parallel.process_group import AbortableProcessGroup

SECOND = timedelta(seconds=10)


class Group:
    """An abort of it waits, as NCCL's waits for the peers'."""

    def __init__(self, barrier: threading.Barrier | threading.Event) -> None:
        self._waits = barrier
        self.aborted = False

    def abort(self) -> None:
        self._waits.wait()
        self.aborted = True
        raise RuntimeError("it is aborted already")


def test_those_of_ours_are_left_to_their_connections_and_the_newest_comes_first() -> None:
    groups = {"world": ("nccl", 0), "writers": (backend.NAME, 0), "tensor": ("nccl", 0), "users": ("gloo", 0)}
    assert abort.foreign(groups) == ["users", "tensor", "world"]


def test_aborts_that_wait_for_one_another_all_end() -> None:
    barrier = threading.Barrier(3)
    groups = [Group(barrier) for _ in range(3)]
    assert abort.finish(abort.start(groups), seconds=10)
    assert all(group.aborted for group in groups)


def test_one_that_never_ends_holds_nothing_up() -> None:
    stuck = threading.Event()
    assert not abort.finish(abort.start([Group(stuck)]), seconds=0.05)
    stuck.set()


ABORTED: list[str] = []


class Recording(c10d.Backend):
    """In the place of NCCL: notes that it is aborted."""

    def __init__(self, options: Any) -> None:
        super().__init__(options.group_rank, options.group_size)
        self.name = str(options.group_id)

    def abort(self) -> None:
        ABORTED.append(self.name)

    def shutdown(self) -> None:
        pass

    def getBackendName(self) -> str:
        return "recording"


@pytest.fixture
def aborted() -> list[str]:
    if "recording" not in dist.Backend.backend_list:
        dist.Backend.register_backend(
            "recording", lambda options, _: Recording(options), extended_api=True, devices=["cpu"]
        )
    ABORTED.clear()
    return ABORTED


def store() -> dist.Store:
    return dist.HashStore()


def test_the_end_of_a_round_aborts_the_default_group_and_those_of_a_mesh_beside_one_of_gloo(aborted: list[str]) -> None:
    group = AbortableProcessGroup()
    with group.joined("recording", store=store, rank=0, size=1, timeout=SECOND):
        dist.new_group([0])
        dist.new_group([0], backend=backend.NAME)
        group.end()
        for thread in threading.enumerate():
            if thread.name == "abort":
                thread.join(10)
        assert len(aborted) == 2
        aborted.clear()
    assert len(aborted) == 2


def test_a_round_that_is_left_in_order_aborts_them_too(aborted: list[str]) -> None:
    with AbortableProcessGroup().joined("recording", store=store, rank=0, size=1, timeout=SECOND):
        dist.new_group([0])
        dist.new_group([0], backend=backend.NAME)
    assert len(aborted) == 2
    assert not dist.is_initialized()
