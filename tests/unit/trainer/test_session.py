"""What a script reports arrives as plain numbers, whatever it is made of."""

import json
import queue
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from disttrain.api import environment
from disttrain.api.runtime import Progress
from disttrain_trainer import session
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.net import reporter
from disttrain_trainer.net.incoming import parse
from unit.trainer.configs import command_config


class Master:
    """What a master does with reports. It reads while `reads` is set, and may start late or lose its connections."""

    def __init__(self) -> None:
        self._reports: queue.Queue[dict[str, Any]] = queue.Queue()
        self.reads = threading.Event()
        self.reads.set()
        self._server = socket.socket()
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._server.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._connection: socket.socket | None = None

    def start(self) -> None:
        self._server.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def __call__(self) -> dict[str, Any]:
        """The next report that it read."""
        return self._reports.get(timeout=20)

    def is_replaced(self) -> None:
        """Another one has the port, and this one's connection breaks."""
        assert self._connection is not None
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self._connection.shutdown(
            socket.SHUT_RD
        )  # says nothing by itself; the close that follows resets the connection

    def close(self) -> None:
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                self._connection = connection = self._server.accept()[0]
            except OSError:
                return
            with connection, connection.makefile("rb") as lines:
                connection.sendall(b'{"type": "welcome"}\n')
                assert json.loads(lines.readline())["session"] is True
                while self.reads.wait(20) and (line := lines.readline()):
                    self._reports.put(parse(json.loads(line)))


@pytest.fixture
def late_master(monkeypatch: pytest.MonkeyPatch) -> Iterator[Master]:
    """A master that has not started."""
    found = Master()
    config = command_config(address=found.address)
    monkeypatch.setenv(environment.JOB, config.model_dump_json(by_alias=True, exclude_none=True))
    monkeypatch.setenv(environment.RESTART_COUNT, "1")
    yield found
    session.close()
    found.close()


@pytest.fixture
def master(late_master: Master) -> Master:
    late_master.start()
    return late_master


def test_tensors_and_numpys_numbers_are_numbers(master: Master) -> None:
    loss = torch.nn.Linear(2, 1)(torch.ones(1, 2)).sum()
    session.report(step=np.int64(3), loss=loss, samples=np.int32(8), total_steps=1000 / 64)  # type: ignore[arg-type]
    said = master()
    assert (said["step"], said["samples"], said["total_steps"], said["generation"]) == (3, 8, 15, 2)
    assert said["loss"] == pytest.approx(8 * loss.item())


def test_what_is_no_number_is_said_and_left_out(master: Master) -> None:
    with pytest.warns(UserWarning, match="session.report ignores loss, which is not a number"):
        session.report(step=1, loss=torch.ones(3))  # type: ignore[arg-type]
    said = master()
    assert (said["step"], said["loss"]) == (1, None)


def test_samples_without_a_loss_count_and_leave_the_mean_as_it_is(
    master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "REPORT_INTERVAL_SECONDS", 60)  # so that the next two go in one message
    session.report(step=0)
    assert master()["step"] == 0
    session.report(step=1, loss=0.5, samples=8)
    session.report(step=2, samples=24)
    session.close()
    said = master()
    assert said["samples"] == 32
    tracker = Tracker(attempt=1)
    tracker.report(rank=0, samples=said["samples"], loss=said["loss"], now=0)
    assert tracker.loss() == 0.5


def test_losses_without_samples_are_averaged_over_the_reports() -> None:
    tracker = Tracker(attempt=1)
    tracker.report(rank=0, samples=0, loss=0.25, now=0)
    tracker.report(rank=1, samples=0, loss=0.75, now=0)
    assert tracker.loss() == 0.5


def test_steps_without_samples_have_no_speed() -> None:
    tracker = Tracker(attempt=1)
    tracker.report(rank=0, samples=0, loss=0.25, now=0)
    assert tracker.samples_per_second(5) is None
    tracker.report(rank=0, samples=8, loss=0.25, now=5)
    assert tracker.samples_per_second(10) == 0.8


def test_a_report_says_how_large_a_world_is_that_torchrun_made(master: Master, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.WORLD_SIZE, "4")
    monkeypatch.setenv(environment.ELASTIC_RUN_ID, "none")
    session.report(step=1)
    assert master()["world"] == 4


def test_a_world_that_a_program_need_not_form_is_not_reported(master: Master, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.WORLD_SIZE, "4")
    monkeypatch.delenv(environment.ELASTIC_RUN_ID, raising=False)
    session.report(step=1)
    assert master()["world"] is None


@pytest.mark.parametrize("field", ["step", "total_steps"])
def test_a_count_that_no_report_of_the_master_can_have_is_refused(field: str) -> None:
    largest = (1 << 53) - 1
    Progress(attempt=1, **{field: parse({"type": "report", field: largest})[field]})
    with pytest.raises(ValueError, match=field):
        parse({"type": "report", field: largest + 1})


def closing() -> threading.Thread:
    thread = threading.Thread(target=session.close)
    thread.start()
    return thread


def test_a_program_ends_when_a_master_that_reads_late_has_its_last_report(master: Master) -> None:
    session.report(step=1)
    assert master()["step"] == 1
    master.reads.clear()
    session.report(step=2)
    end = closing()
    end.join(reporter.FLUSH_SECONDS + 1)
    assert end.is_alive(), "the master has not read it"
    master.reads.set()
    end.join(20)
    assert master()["step"] == 2


def test_a_program_that_ends_before_its_master_has_started_reports_its_last_step(late_master: Master) -> None:
    session.report(step=7, loss=0.5)
    end = closing()
    end.join(reporter.FLUSH_SECONDS + 1)
    late_master.start()
    end.join(20)
    said = late_master()
    assert (said["step"], said["loss"]) == (7, 0.5)


def test_a_new_master_hears_what_was_said_to_the_one_before(master: Master) -> None:
    made = reporter.Reporter(command_config(address=master.address), 0, round_number=1, output=True)
    made.add(step=7, loss=0.5, samples=8, total_steps=9)
    assert master()["samples"] == 8
    master.is_replaced()
    made.close()
    said = master()
    assert (said["step"], said["total_steps"], said["loss"], said["samples"]) == (7, 9, 0.5, 0)


def test_a_program_that_is_to_end_waits_for_no_master(late_master: Master) -> None:
    made = reporter.Reporter(command_config(address=late_master.address), 0, round_number=1)
    made.add(step=1)
    began = time.monotonic()
    made.hurry()
    made.close()
    assert time.monotonic() - began < 10, "not the peer timeout of 30 s"
