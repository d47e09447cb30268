"""Reports in the form of Kubeflow's Trainer, as the callback of transformers posts them, reach the master; others are refused."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from disttrain_trainer.coordinator.trainer_status import TrainerStatus, TrainerStatusReports
from disttrain_trainer.net.incoming import parse
from disttrain_trainer.runtime import exposition
from disttrain_trainer.runtime.exposition import Inbox


def body(percentage: int | None, **metrics: object) -> bytes:
    """As transformers 5 makes it."""
    status: dict[str, Any] = {"lastUpdatedTime": "2026-11-30T00:00:00+00:00", "estimatedRemainingSeconds": 3}
    if percentage is not None:
        status["progressPercentage"] = percentage
    if metrics:
        status["metrics"] = [{"name": name, "value": str(value)} for name, value in metrics.items()]
    return json.dumps({"trainerStatus": status}).encode()


def said(*bodies: bytes) -> list[tuple[Any, ...]]:
    reports = TrainerStatusReports()
    messages = [parse(reports.message(TrainerStatus.parse(one))) for one in bodies]
    return [tuple(message[name] for name in ("step", "total_steps", "loss", "epoch")) for message in messages]


def test_the_trainer_of_transformers_says_steps_and_loss() -> None:
    assert said(
        body(0, total_steps=40),
        body(25, loss=0.5, learning_rate=0.1, current_step=10, total_steps=40, current_epoch=0.5),
        body(99, loss="nan", current_step=39, total_steps=40, current_epoch=2.0),
        body(100, loss=0.25, train_loss=0.4, train_runtime=3.0, epoch=2.0),
    ) == [(None, 40, None, None), (10, 40, 0.5, 1), (39, 40, None, 2), (40, 40, 0.25, 2)]


def test_a_program_that_knows_percentages_alone_has_a_hundred_steps() -> None:
    assert said(body(0), body(37, loss=0.5), body(100)) == [
        (0, 100, None, None),
        (37, 100, 0.5, None),
        (100, 100, None, None),
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        body(101),
        b'{"trainerStatus": {"metrics": [{"name": "loss", "value": ["x"]}]}}',
        json.dumps({"trainerStatus": {"metrics": [{"name": "x", "value": "1"}] * 257}}).encode(),
        b"[" * 30_000,
    ],
)
def test_what_has_another_form_is_refused_in_one_line(wrong: bytes) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        TrainerStatus.parse(wrong)


TAKEN: list[bytes] = []


def take(content: bytes) -> None:
    TrainerStatus.parse(content)
    TAKEN.append(content)


@pytest.fixture(scope="module")
def url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    exposition.serve(CollectorRegistry(), host="127.0.0.1", port=port, inbox=Inbox("/trainer-status", "secret", take))  # type: ignore[arg-type]
    return f"http://127.0.0.1:{port}/trainer-status"


def post(url: str, content: bytes, *, token: str = "secret", **headers: str) -> int:
    request = urllib.request.Request(url, data=content, method="POST")
    request.add_header("Authorization", f"Bearer {token}")
    for name, value in headers.items():
        request.add_header(name.replace("_", "-"), value)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_a_report_with_the_token_is_taken_and_any_other_is_not(url: str) -> None:
    TAKEN.clear()
    assert post(url, body(10)) == 200
    assert post(url, body(10), token="guess") == 401
    assert post(url, body(10), token="") == 401
    assert post(url, b"nothing") == 400
    assert post(url.replace("trainer-status", "progress"), body(10)) == 405
    assert post(url, body(10), Content_Length=str(1 << 40)) == 413
    assert [body(10)] == TAKEN
