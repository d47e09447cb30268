"""Programs whose processes do not train together are distinguished from those that do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cluster.processes import wait_for
from disttrain.api import environment
from disttrain_trainer.coordinator.command import CommandCoordinator
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.net.members import Round
from disttrain_trainer.strategies import joining
from disttrain_trainer.strategies.script import alone, contract
from unit.trainer.configs import command_config

WAITS = """
import multiprocessing, sys
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    ends = context.Event()
    context.Process(target=ends.wait, daemon=True).start()
    print("started", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize(("method", "spawned"), [("spawn", True), ("fork", False)])
def test_processes_that_a_script_spawns_are_seen(tmp_path, method: str, spawned: bool) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    command = [sys.executable, str(tmp_path / "waits.py"), method]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0) as script:
        assert script.stdin is not None
        assert script.stdout is not None
        script.stdout.readline()
        if spawned:
            wait_for("the process of its own", lambda: joining.spawns(frozenset({script.pid})), seconds=30)
        assert joining.spawns(frozenset({script.pid})) == spawned
        assert not joining.spawns(frozenset({1 << 30})), "those of another program"
        script.stdin.close()


@pytest.mark.parametrize("spawned", [True, False])
def test_the_hint_says_what_to_use_instead(spawned: bool) -> None:
    text = joining.hint(command_config(), seconds=45, spawned=spawned)
    assert "45 s" in text
    for way in ("worker.replicas", "worker.processesPerWorker", "torch.multiprocessing.spawn", "trainer.command"):
        assert way in text


def test_the_only_process_of_a_script_has_a_store_of_its_own() -> None:
    """Under the store of an agent every process connects, and those that a program spawns would wait for a host for ever."""
    config = command_config()
    given = contract(config, index=0, local_rank=0, this_round=Round(1))
    own = alone(given, port=4711)
    assert given.keys() - own.keys() == {environment.USE_AGENT_STORE}
    assert (own[environment.MASTER_ADDR], own[environment.MASTER_PORT]) == ("127.0.0.1", "4711")


def reports(*sizes: int | None, workers: int) -> str | None:
    tracker = Tracker(attempt=1)
    coordinator = CommandCoordinator(tracker=tracker, workers=workers)
    for size in sizes:
        coordinator.reported(0, {"step": 1, "world": size}, 0)
    return tracker.warning


@pytest.mark.parametrize(("sizes", "workers"), [((1, 2), 2), ((1, 8), 2), ((None,), 2), ((), 2), ((1,), 1)], ids=repr)
def test_a_command_in_one_world_or_in_an_unknown_one_is_not_warned_of(
    sizes: tuple[int | None, ...], workers: int
) -> None:
    assert reports(*sizes, workers=workers) is None


@pytest.mark.parametrize(("sizes", "workers"), [((1, 1), 2), ((None, 1), 2), ((2, 2), 4)], ids=repr)
def test_a_command_whose_workers_train_apart_is_warned_of(sizes: tuple[int | None, ...], workers: int) -> None:
    largest = max(size or 0 for size in sizes)
    warning = reports(*sizes, workers=workers)
    assert warning is not None
    assert f"the job has {workers} workers, but no process reported a world of more than {largest}" in warning
