"""What a script reports arrives as plain numbers, whatever it is made of."""

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from disttrain.api import environment
from disttrain_trainer import session
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.net.incoming import parse
from unit.trainer.configs import command_config


@pytest.fixture
def master(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that gives the next report to a master."""
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.settimeout(20)
        opened.callback(session.close)
        address = f"127.0.0.1:{server.getsockname()[1]}"
        config = command_config(address=address)
        monkeypatch.setenv(environment.JOB, config.model_dump_json(by_alias=True, exclude_none=True))
        monkeypatch.setenv(environment.RESTART_COUNT, "1")
        lines: list[Any] = []

        def following() -> dict[str, Any]:
            if not lines:
                connection = opened.enter_context(server.accept()[0])
                connection.settimeout(20)
                lines.append(opened.enter_context(connection.makefile("rb")))
                following.welcome = lambda: connection.sendall(b"{}\n")  # type: ignore[attr-defined]
                assert json.loads(lines[0].readline())["session"] is True
            return parse(json.loads(lines[0].readline()))

        yield following


def test_tensors_and_numpys_numbers_are_numbers(master: Any) -> None:
    loss = torch.nn.Linear(2, 1)(torch.ones(1, 2)).sum()
    session.report(step=np.int64(3), loss=loss, samples=np.int32(8), total_steps=1000 / 64)  # type: ignore[arg-type]
    said = master()
    assert (said["step"], said["samples"], said["total_steps"], said["generation"]) == (3, 8, 15, 2)
    assert said["loss"] == pytest.approx(8 * loss.item())


def test_what_is_no_number_is_said_and_left_out(master: Any) -> None:
    with pytest.warns(UserWarning, match="session.report ignores loss, which is not a number"):
        session.report(step=1, loss=torch.ones(3))  # type: ignore[arg-type]
    said = master()
    assert (said["step"], said["loss"]) == (1, None)


def test_samples_without_a_loss_count_and_leave_the_mean_as_it_is(master: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "REPORT_INTERVAL_SECONDS", 60)  # so that the next two go in one message
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


def test_a_report_says_how_large_a_world_is_that_torchrun_made(master: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.WORLD_SIZE, "4")
    monkeypatch.setenv(environment.ELASTIC_RUN_ID, "none")
    session.report(step=1)
    assert master()["world"] == 4


def test_a_world_that_a_program_need_not_form_is_not_reported(master: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.WORLD_SIZE, "4")
    monkeypatch.delenv(environment.ELASTIC_RUN_ID, raising=False)
    session.report(step=1)
    assert master()["world"] is None


def test_the_last_report_reaches_a_master_that_reads_late(master: Any) -> None:
    session.report(step=1)
    assert master()["step"] == 1
    master.welcome()
    session.report(step=2)
    session.close()
    assert master()["step"] == 2
