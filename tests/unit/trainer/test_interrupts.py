"""A KeyboardInterrupt that user code raises is its error; one that a SIGINT raised is an interruption."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from disttrain.api import Termination, environment
from disttrain_trainer.entry import Entry
from disttrain_trainer.runtime import logs, machine
from disttrain_trainer.strategies import command
from unit.trainer.configs import command_config


@pytest.mark.parametrize(("by_signal", "code"), [(False, 1), (True, 130)])
def test_the_exit_code_says_whether_a_signal_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_signal: bool, code: int
) -> None:
    words = {environment.JOB: command_config().encode(), environment.ROLE: "worker"}
    for name, value in {**words, environment.TERMINATION_LOG: str(tmp_path / "said")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logs, "configure", lambda *_: None)  # the other tests have handlers of their own
    handler = signal.getsignal(signal.SIGINT)

    def users_code(*_: Any, **__: Any) -> None:
        if not by_signal:
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(command, "run", users_code)  # the job is a command
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        machine.note_interrupts()
        assert Entry().run() == code
    finally:
        signal.signal(signal.SIGINT, handler)
    assert Termination.decode((tmp_path / "said").read_text()).message == "KeyboardInterrupt"
