"""What a run looks like: plain lines without a terminal, colours and a bar with one."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from disttrain.api.job import DistTrainJob
from disttrain.api.names import Role
from disttrain.api.runtime import Progress
from disttrain.api.status import DistTrainJobStatus
from disttrain.cli.durations import duration
from disttrain.cli.screen import PlainScreen, screen_for
from disttrain.cli.summary import summary
from disttrain.cli.terminal import Bar
from disttrain.cli.words import numbers
from disttrain.local.folders import RunFolder
from disttrain.local.processes import Process
from disttrain.plan.model import Event

NOW = datetime(2026, 1, 1, tzinfo=UTC)
PROGRESS = Progress(attempt=1, step=30, total_steps=120, loss=0.123456, samples_per_second=5120.4, world_size=2)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def job(**status: Any) -> DistTrainJob:
    strategy = {"type": "ParameterServer", "parameterServer": {"consistency": "Sync"}}
    trainer = {"model": "a:b", "dataset": "a:c", "epochs": 1, "optimizer": {"name": "SGD", "learningRate": 0.1}}
    spec = {"strategy": strategy, "trainer": trainer, "parameterServer": {"replicas": 2}, "worker": {"replicas": 12}}
    checkpoint = {"volume": {"persistentVolumeClaim": "ckpt"}}
    body = {"metadata": {"name": "digits"}, "spec": spec | {"checkpoint": checkpoint}, "status": status}
    return DistTrainJob.parse(body)


def process(index: int) -> Process:
    paths = {"log": Path("log"), "termination_log": Path("words")}
    return Process(
        name=f"digits-worker-{index}", uid="u", role=Role.WORKER, index=index, attempt=1, metrics_port=1, **paths
    )


TRAINING = {"state": "Training", "training": {"step": 30, "totalSteps": 120}}


def test_plain_lines_carry_their_names_in_one_column() -> None:
    stream = io.StringIO()
    with PlainScreen(stream, job(), quiet=False) as screen:
        screen.line(process(3), "hello [bold]you[/bold]")
        screen.line(process(11), "hello")
        screen.event(Event(reason="R", message="worker-1 was lost", warning=True))
    assert stream.getvalue() == "[worker-3]  hello [bold]you[/bold]\n[worker-11] hello\nwarning: worker-1 was lost\n"


def test_plain_progress_comes_with_a_new_state_and_now_and_then() -> None:
    stream = io.StringIO()
    with PlainScreen(stream, job(), quiet=False) as screen:
        screen.changed(job(state="Starting"), None)
        for _ in range(100):
            screen.changed(job(**TRAINING), PROGRESS)
    assert (
        stream.getvalue()
        == "digits: Starting\ndigits: Training  step 30/120  loss 0.1235  5120 samples/s  ETA 0:01  workers 2/12\n"
    )


def test_quiet_leaves_the_processes_out() -> None:
    stream = io.StringIO()
    with PlainScreen(stream, job(), quiet=True) as screen:
        screen.started(process(1), "starts; metrics at http://127.0.0.1:1/metrics")
        screen.line(process(1), "hello")
    assert stream.getvalue() == "[worker-1]  starts; metrics at http://127.0.0.1:1/metrics\n"


def test_what_the_job_waits_for_is_reported() -> None:
    condition = {
        "type": "Ready",
        "status": "False",
        "reason": "WaitingForPeers",
        "message": "Waiting for worker-1",
        "lastTransitionTime": NOW,
    }
    stream = io.StringIO()
    with PlainScreen(stream, job(), quiet=False) as screen:
        screen.changed(job(state="Starting", conditions=[condition]), None)
    assert stream.getvalue() == "digits: Starting  Waiting for worker-1\n"


@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_has_a_bar_and_stable_colours(colour: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    if colour:
        monkeypatch.delenv("NO_COLOR", raising=False)
    else:
        monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    with screen_for(stream, job(), quiet=False) as screen:
        screen.changed(job(**TRAINING), PROGRESS)
        screen.line(process(1), "hello [bold]you[/bold]")
    text = stream.getvalue()
    assert "hello [bold]you[/bold]" in text
    assert "step 30/120  loss 0.1235  5120 samples/s  ETA 0:01" in text
    assert "━" in text
    assert ("\x1b[32m[worker-1]" in text) is colour, "worker-1 is green in every run"


LONG = "resnet50-imagenet-baseline-2026-11-23-a"
NUMBERS = "step 30/120  loss 0.1235  5120 samples/s  ETA 0:01"


@pytest.mark.parametrize(
    ("name", "columns", "shown"),
    [
        ("digits", 120, f"digits Training {'━' * 8:30} {NUMBERS}  workers 2/12"),
        ("digits", 100, f"digits Training {'━' * 5:19} {NUMBERS}  workers 2/12"),
        ("digits", 80, f"digits Training {NUMBERS}  workers 2/12"),
        ("digits", 60, f"digits {NUMBERS}"),
        ("digits", 40, "digits Training step 30/120  loss 0.1235"),
        (LONG, 120, f"{LONG} Training {NUMBERS}  workers 2/12"),
        (LONG, 100, f"resnet50-imagenet-baseline-2026-11… {NUMBERS}  workers 2/12"),
        (LONG, 80, f"resnet50-image… {NUMBERS}  workers 2/12"),
        (LONG, 60, f"resnet50… {NUMBERS}"),
        (LONG, 40, "resnet50-image… step 30/120  loss 0.1235"),
    ],
)
def test_the_numbers_have_their_place_first_in_one_line_of_any_width(name: str, columns: int, shown: str) -> None:
    console = Console(file=io.StringIO(), width=columns, force_terminal=True, soft_wrap=True, color_system=None)
    described = job(**TRAINING)
    named = described.model_copy(update={"metadata": described.metadata.model_copy(update={"name": name})})
    console.print(Bar(named, PROGRESS))
    (line,) = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert re.sub("[╸╺]", "━", line).rstrip() == shown
    assert len(line) <= columns


def test_twenty_thousand_lines_do_not_keep_a_terminal_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with screen_for(stream, job(), quiet=False) as screen:
        screen.changed(job(**TRAINING), PROGRESS)
        for number in range(20_000):
            screen.line(process(1), f"step {number}")
    assert "step 19999\r\n" in stream.getvalue() or "step 19999\n" in stream.getvalue()
    # The bar is drawn once for a batch. Drawn for each line it took half a minute.
    assert stream.getvalue().count("samples/s") < 2_000


def test_what_a_program_prints_moves_no_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    with screen_for(stream, job(), quiet=False) as screen:
        screen.line(process(1), "\x1b[31mred\x1b[0m \x1b[2J\x1b[Hhome\x07")
        screen.line(process(1), "bell\x07 and back\x08")
        screen.print_line("one\n  two")
    text = stream.getvalue()
    assert "\x1b[31mred\x1b[0m home" in text
    assert "bell and back\n" in text
    assert "one\n  two\n" in text
    assert "\x1b[2J" not in text


def test_a_command_has_neither_steps_nor_workers_to_show() -> None:
    spec = {"strategy": {"type": "DataParallel"}, "trainer": {"command": ["x"]}}
    status = {"state": "Training", "training": {"step": 0}}
    described = DistTrainJob.parse({"metadata": {"name": "c"}, "spec": spec, "status": status})
    assert numbers(described, Progress(attempt=1)) == ""
    assert numbers(described, Progress(attempt=1, step=3, loss=0.5)) == "step 3  loss 0.5"


def test_a_dumb_terminal_has_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(screen_for(Terminal(), job(), quiet=False), PlainScreen)


def test_the_summary_of_a_run_that_completed(tmp_path: Path) -> None:
    folder = RunFolder.new("digits", tmp_path)
    training = {"step": 120, "totalSteps": 120, "epoch": 5, "loss": 0.02, "evaluation": {"accuracy": 0.978}}
    training |= {"lastCheckpoint": {"step": 120, "time": NOW}, "resumed": "Resumed at step 40; changed: x: 1 -> 2"}
    last = {"role": "Worker", "index": 1, "reason": "Error", "exitCode": 137, "time": NOW}
    text = summary(
        job(state="Complete", training=training, restarts={"total": 1, "last": last}, goodput={"redoneSeconds": 2}),
        folder,
        seconds=12.34,
        interrupted=False,
    )
    assert text.splitlines() == [
        "digits: Complete in 12.3 s",
        "  steps       120 of 120, epoch 5",
        "  start       resumed at step 40; changed: x: 1 -> 2",
        "  loss        0.02",
        "  evaluation  accuracy 0.978",
        "  restarts    1; the last: Worker 1, Error, exit code 137; 2 s redone",
        f"  checkpoint  step 120 in {tmp_path}/claims/ckpt/{folder.path.name}",
        f"  logs        {folder.path}/logs",
    ]
    folder.close()


def test_the_summary_of_a_run_that_failed(tmp_path: Path) -> None:
    folder = RunFolder.new("digits", tmp_path)
    condition = {
        "type": "Failed",
        "status": "True",
        "reason": "UserCodeFailed",
        "message": "ValueError: x; log: y",
        "lastTransitionTime": NOW,
    }
    lines = summary(job(state="Failed", conditions=[condition]), folder, seconds=3, interrupted=False).splitlines()
    assert lines[:2] == ["digits: Failed after 3.0 s", "  UserCodeFailed: ValueError: x; log: y"]
    folder.close()


def test_the_summary_of_an_interrupted_run_says_whether_there_is_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    folder = RunFolder.new("digits", tmp_path)
    saved = {"step": 5, "lastCheckpoint": {"step": 4, "time": NOW}}
    first = [
        summary(job(state="Training", training=training), folder, seconds=3, interrupted=True).splitlines()[0]
        for training in (saved, {"step": 5})
    ]
    assert first == [
        "digits: interrupted after 3.0 s; `disttrain run --resume FILE` goes on from the last checkpoint",
        "digits: interrupted after 3.0 s; no checkpoint was written yet",
    ]
    folder.close()


@pytest.mark.parametrize(("seconds", "text"), [(4.21, "4.2 s"), (59.99, "60.0 s"), (187, "3:07"), (3729, "1:02:09")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_status_without_anything_is_shown_all_the_same(tmp_path: Path) -> None:
    folder = RunFolder.new("digits", tmp_path)
    assert DistTrainJobStatus() == job().status
    assert "logs" in summary(job(), folder, seconds=0, interrupted=True)
    folder.close()
