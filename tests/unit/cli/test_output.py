"""Output to streams that are slow or gone: the run does not wait for them, and one line says what was left out."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path

from cluster.processes import wait_for
from disttrain.cli.output import MOST_CHARACTERS, Backlog, Line, Sink


def test_lines_come_in_their_order_until_the_end() -> None:
    backlog = Backlog()
    for text in "abc":
        backlog.add(Line(text))
    assert [line.text for line in backlog.take() or ()] == ["a", "b", "c"]
    backlog.wake()
    backlog.add(Line("d"))
    backlog.close()
    assert [line.text for line in backlog.take() or ()] == ["d"]
    assert backlog.take() is None


def test_of_a_backlog_that_is_too_long_what_may_be_left_out_is_and_that_is_said() -> None:
    backlog = Backlog()
    backlog.add(Line("our own"))
    for number in range(3):
        backlog.add(Line(f"{number}" + "x" * (MOST_CHARACTERS // 3), optional=True))
    backlog.add(Line("after", optional=True))
    assert [line.text for line in backlog.take() or ()] == [
        "(3 lines are left out here; they are in the logs)",
        "our own",
        "after",
    ]


def test_a_pipe_that_is_full_is_waited_for_and_all_arrives() -> None:
    out, into = os.pipe()
    os.set_blocking(into, False)  # as a program before us may have left it
    with os.fdopen(into, "w") as stream, os.fdopen(out) as reader:
        sink = Sink(stream)
        text = "x" * 1_000_000
        sink.write(text)
        writing = threading.Thread(target=sink.flush)
        writing.start()
        wait_for("the pipe to be full", lambda: sink.written > 0, 10)
        assert len(reader.read(len(text))) == len(text)
        writing.join(10)
        assert sink.lost is None


def test_the_first_failure_is_reported_once_and_then_there_is_silence() -> None:
    message: list[OSError] = []
    with Path("/dev/full").open("w") as full:
        sink = Sink(full)
        sink.when_lost = message.append
        for _ in range(3):
            sink.write("hello")
            sink.flush()
        assert [error.strerror for error in message] == ["No space left on device"]
        assert sink.lost is message[0]


def test_a_character_that_the_stream_cannot_hold_is_replaced(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="latin-1") as stream:
        sink = Sink(stream)
        sink.write("50 \u2588 é")
        sink.flush()
    assert (tmp_path / "out").read_bytes() == b"50 ? \xe9"


def test_a_stream_without_a_descriptor_will_do() -> None:
    stream = io.StringIO()
    sink = Sink(stream)
    sink.write("a")
    sink.write("b")
    assert stream.getvalue() == ""
    sink.flush()
    assert stream.getvalue() == "ab"
