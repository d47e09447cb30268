"""Log lines: as text, and as JSON with the place of the process in its job."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from disttrain.api import environment
from disttrain.api.names import Role
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.runtime.process import Process
from unit.trainer.configs import command_config

PROGRAM = """
import json, sys
from disttrain_trainer.runtime import logs
logs.configure("-")
log = logs.get_logger("disttrain_trainer.entry")
logs.configure("worker-1", json.loads(sys.argv[1]))
logs.at_step(7)
log.warning("%s is lost", "worker-0")
logs.show("Traceback of the user\\nValueError: one\\n")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("two")
"""
LABELS = Process(config=command_config(), role=Role.WORKER, index=1).labels


def lines(log_format: str | None) -> list[str]:
    environ = {name: value for name, value in os.environ.items() if name != environment.LOG_FORMAT}
    environ |= {environment.LOG_FORMAT: log_format} if log_format else {}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(LABELS)], env=environ, capture_output=True, text=True, check=True
    )
    return done.stderr.splitlines()


def test_labels_name_the_job_the_attempt_and_the_place_of_the_process() -> None:
    config = command_config()
    place = {"job": f"{config.namespace}/{config.name}", "uid": config.uid, "attempt": 1, "role": "worker", "rank": 1}
    assert place == LABELS


def test_each_json_line_has_the_labels_and_the_step() -> None:
    records: list[dict[str, Any]] = [json.loads(line) for line in lines("json")]
    assert [record["message"] for record in records] == [
        "worker-0 is lost",
        "Traceback of the user\nValueError: one\n",
        "two",
    ]
    assert [record["level"] for record in records] == ["warning", "error", "error"]
    assert all(record["step"] == 7 and LABELS.items() <= record.items() for record in records)
    assert records[0]["time"].endswith("+00:00")
    assert "ZeroDivisionError" in records[2]["exception"]


@pytest.mark.parametrize("log_format", [None, "text"])
def test_text_is_the_default(log_format: str | None) -> None:
    first, second, *_ = lines(log_format)
    assert first.split(" ", 1)[1] == "WARNING worker-1 7 worker-0 is lost"
    assert second == "Traceback of the user"


def test_unknown_format_is_refused_in_one_line() -> None:
    environ = {environment.JOB: command_config().encode(), environment.ROLE: "worker", environment.LOG_FORMAT: "yaml"}
    with pytest.raises(WrongInput, match="DISTTRAIN_LOG_FORMAT: 'yaml' is no log format; expected text or json"):
        Process.read(environ)
