"""Batches that other processes load: by the number of their part, whatever was foreseen, and whatever becomes of a process."""

import contextlib
import faulthandler  # noqa: F401 - a test disables it in a process
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.processes import wait_for
from disttrain_trainer.data.loader_processes import Key, LoaderProcesses, NotForeseen
from disttrain_trainer.errors import LoaderLost, OwnGroup, UserError, WrongInput
from disttrain_trainer.runtime import termination


@contextlib.contextmanager
def loaders(load: Any, count: int = 2, **options: Any) -> Iterator[LoaderProcesses]:
    made = LoaderProcesses(count, load, dataset=None, around=contextlib.nullcontext, **options)
    try:
        yield made
    finally:
        made.close()


def numbered(key: Key) -> Any:
    part, batch = key
    return {"x": torch.full((4,), part), "y": (np.array([batch]), "text")}


def keys(*parts: int) -> list[Key]:
    return [(part, 0) for part in parts]


def test_batches_come_by_their_parts_in_any_order() -> None:
    with loaders(numbered, 3) as processes:
        processes.foresee(keys(0), keys(1, 2, 3))
        for part in (2, 0, 3, 1):
            batch = processes.take((part, 0))
            assert batch["x"].tolist() == [part] * 4
            assert batch["y"] == (np.array([0]), "text")


def test_what_was_not_foreseen_is_said_to_be_so() -> None:
    with loaders(numbered) as processes:
        processes.foresee(keys(0), keys(1))
        with pytest.raises(NotForeseen):
            processes.take((7, 0))
        assert processes.take((0, 0))["x"][0] == 0


def test_what_was_foreseen_wrongly_is_thrown_away_and_loaded_again_when_it_is_foreseen_again(tmp_path: Path) -> None:
    def load(key: Key) -> Any:
        with (tmp_path / "loaded").open("a") as file:
            file.write(f"{key[0]} ")
        return key[0]

    with loaders(load, 1) as processes:
        processes.foresee(keys(0), keys(1, 2))
        wait_for(
            "the batches", lambda: (tmp_path / "loaded").exists() and len((tmp_path / "loaded").read_text()) == 6, 20
        )
        processes.foresee(keys(0), keys(5))
        assert processes.take((5, 0)) == 5
        processes.foresee(keys(0), keys(2))
        assert [processes.take((part, 0)) for part in (0, 2)] == [0, 2]
    assert (tmp_path / "loaded").read_text() == "0 1 2 5 2 "


def test_of_many_batches_that_are_needed_now_few_are_there_at_a_time(tmp_path: Path) -> None:
    def load(key: Key) -> Any:
        (tmp_path / f"{key[1]}").touch()
        return torch.full((2,), key[1])

    def loaded() -> list[int]:
        return sorted(int(file.name) for file in tmp_path.iterdir())

    with loaders(load, 2) as processes:
        processes.foresee([(0, batch) for batch in range(3000)], ())  # portions of one part
        wait_for("the first batches", lambda: loaded() == list(range(5)), 20)
        for batch in range(20):
            assert processes.take((0, batch)).tolist() == [batch] * 2
        wait_for("the next batches", lambda: loaded() == list(range(25)), 20)
        with pytest.raises(NotForeseen):
            processes.take((0, 2000))
        assert processes.take((0, 20))[0] == 20


def test_a_limit_of_open_files_is_one_line() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with loaders(lambda key: [torch.zeros(1) for _ in range(40)], 1) as processes:
        in_use = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 20, hard))
        try:
            processes.foresee(keys(0), ())
            with pytest.raises(UserError, match=r"^trainer\.loaderWorkers: too many open files: .*ulimit -n"):
                processes.take((0, 0))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_batch_that_is_being_loaded_is_not_asked_for_twice(tmp_path: Path) -> None:
    def load(key: Key) -> Any:
        with (tmp_path / "loaded").open("a") as file:
            file.write(f"{key[0]} ")
        time.sleep(0.05)
        return key[0]

    with loaders(load) as processes:
        for _ in range(3):
            processes.foresee(keys(0), keys(1, 2, 3))
        assert [processes.take((part, 0)) for part in range(4)] == [0, 1, 2, 3]
    assert sorted((tmp_path / "loaded").read_text().split()) == ["0", "1", "2", "3"]


class Mine(Exception):
    """An error that pickle cannot make again."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} of {second}")


def raise_(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        pytest.param(ValueError("mine"), ValueError, "ValueError: mine", id="ValueError"),
        pytest.param(FileNotFoundError(2, "gone", "a.png"), FileNotFoundError, "gone: 'a.png'", id="file"),
        pytest.param(SystemExit(3), SystemExit, "SystemExit: 3", id="exit"),
        pytest.param(Mine(1, 2), termination.RaisedElsewhere, "Mine: 1 of 2", id="not picklable"),
    ],
)
def test_an_error_of_user_code_is_reported_by_its_line_as_without_loader_processes(
    error: BaseException, kind: type[BaseException], message: str
) -> None:
    def load(key: Key) -> Any:
        return raise_(error)

    with loaders(load) as processes:
        processes.foresee(keys(0), keys(1))
        with pytest.raises(kind) as raised:
            processes.take((0, 0))
    shown, reported = termination.of_user_error(raised.value)
    line = raise_.__code__.co_firstlineno + 1
    assert reported.where == f"{__file__}:{line}"
    assert message in reported.message
    assert f'test_loader_processes.py", line {line}, in raise_' in shown
    assert "disttrain_trainer" not in shown


def test_an_error_of_a_batch_that_was_foreseen_wrongly_is_never_raised() -> None:
    def load(key: Key) -> Any:
        return 1 // (key[0] - 1)

    with loaders(load, 1) as processes:
        processes.foresee(keys(0), keys(1, 2))
        assert processes.take((2, 0)) == 1
        processes.foresee(keys(3), keys(4))
        assert processes.take((3, 0)) == 0


@pytest.mark.parametrize(
    ("error", "kind"), [(UserError("one line"), UserError), (OwnGroup("trainer.dataset", " (a:1)"), WrongInput)]
)
def test_a_line_of_ours_keeps_its_words_and_its_exit_code(error: Exception, kind: type[Exception]) -> None:
    def load(key: Key) -> Any:
        raise error

    with loaders(load) as processes:
        processes.foresee(keys(0), ())
        with pytest.raises(kind) as raised:
            processes.take((0, 0))
    assert str(raised.value) == str(error)


def test_a_batch_that_cannot_be_sent_is_one_line() -> None:
    with loaders(lambda key: threading.Lock()) as processes:
        processes.foresee(keys(0), ())
        with pytest.raises(
            UserError, match=r"^trainer\.collate or trainer\.dataset gives a batch that cannot be sent .*lock"
        ):
            processes.take((0, 0))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL while it loaded part 1"),
        (
            "faulthandler.disable(); os.kill(os.getpid(), signal.SIGBUS)",
            "was killed by SIGBUS while it loaded part 1: /dev/shm is full",
        ),
        ("os.closerange(3, 1 << 14); time.sleep(60)", "was killed by SIGKILL while it loaded part 1"),
        ("os._exit(3)", "ended with exit code 3 while it loaded part 1: the code of trainer.dataset"),
    ],
)
def test_a_loader_process_that_is_gone_is_named_in_one_line(how: str, said: str) -> None:
    def load(key: Key) -> Any:
        if key[0] == 1:
            exec(how)
        return key[0]

    with loaders(load, 1) as processes:
        processes.foresee(keys(0), keys(1))
        assert processes.take((0, 0)) == 0
        with pytest.raises(LoaderLost) as raised:
            processes.take((1, 0))
        assert f"loader process 0 of 1 (trainer.loaderWorkers) {said}" in str(raised.value)
        with pytest.raises(LoaderLost):
            processes.foresee(keys(2), ())


def test_a_batch_is_received_in_a_thread_by_what_the_caller_wants_done_with_it() -> None:
    with loaders(numbered, receive=lambda batch: (threading.current_thread().name, batch["x"][0].item())) as processes:
        processes.foresee(keys(3), ())
        assert processes.take((3, 0)) == ("loaders", 3)


def test_large_batches_of_objects_do_not_wait_for_one_another() -> None:
    with loaders(lambda key: [str(key[0]) * 1000] * 1000) as processes:
        processes.foresee(keys(0), keys(1, 2, 3))
        assert [processes.take((part, 0))[999][:2] for part in (3, 2, 1, 0)] == ["33", "22", "11", "00"]


def test_a_loader_process_knows_that_it_is_one() -> None:
    def load(key: Key) -> Any:
        info = torch.utils.data.get_worker_info()
        assert info is not None
        return info.id, info.num_workers, torch.get_num_threads()

    with loaders(load, 2) as processes:
        processes.foresee(keys(0), keys(1))
        assert {processes.take((part, 0)) for part in range(2)} == {(0, 2, 1), (1, 2, 1)}


def test_loader_processes_have_no_connection_and_no_port_of_their_parent() -> None:
    def load(key: Key) -> Any:
        found = [socket.socket(fileno=os.dup(fd)).family for fd in (there, listening) if is_socket(fd)]
        return found, Path(f"/proc/self/fd/{kept.fileno()}").exists()

    def is_socket(number: int) -> bool:
        return os.readlink(f"/proc/self/fd/{number}").startswith("socket:")

    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        Path(__file__).open() as kept,
    ):
        there, listening = client.fileno(), listener.fileno()
        peer, _ = listener.accept()
        with peer, loaders(load, 1) as processes:
            processes.foresee(keys(0), ())
            assert processes.take((0, 0)) == ([], True)
            client.close()
            peer.settimeout(20)
            assert peer.recv(1) == b"", "the connection ends with its parent's end"


ORPHANS = """
import contextlib, sys, time
from disttrain_trainer.data.loader_processes import LoaderProcesses

made = LoaderProcesses(2, lambda key: time.sleep(60), dataset=None, around=contextlib.nullcontext)
made.foresee([(0, 0)], [(1, 0)])
print(*made.pids, flush=True)
time.sleep(60)
"""


def test_loader_processes_end_with_their_parent_however_that_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.send_signal(signal.SIGKILL)
        parent.wait()

        def running() -> list[int]:
            found = []
            for pid in pids:
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                        found.append(pid)
            return found

        wait_for("the end of the loader processes", lambda: not running(), 20)
