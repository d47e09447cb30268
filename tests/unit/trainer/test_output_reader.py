"""What a program prints becomes its progress, whatever pieces it comes in and whatever the pattern is."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from disttrain.api.output_progress import compiled
from disttrain_trainer.coordinator.printed_reports import PrintedReports
from disttrain_trainer.runtime import output_reader
from disttrain_trainer.runtime.output_reader import Lines, OutputReader, Printed, ProgressPattern

PATTERN = "step (?P<step>[0-9]+).*loss (?P<loss>[0-9.e-]+)"
EVERY = r"(?P<step>\d+)/(?P<total>[\d,]+) loss=(?P<loss>\S+) seen=(?P<samples>\d+)"


@pytest.mark.parametrize(
    ("pattern", "line", "found"),
    [
        (PATTERN, b"rank 0 step 12: loss 3.5e-2, lr 0.1", Printed(12, 0.035)),
        (PATTERN, b"step 12", None),
        (PATTERN, b"step 12 loss ---", Printed(12)),
        (PATTERN, b"\xff\xfe step 7 \x00 loss 1", Printed(7, 1.0)),
        ("(?P<step>.+) of", b"many of them", None),
        ("it (?P<step>\\S+)", b"it 1,024", Printed(1024)),
        ("it (?P<step>\\S+)", b"it 1e999", None),
        ("it (?P<step>\\S+)", b"it -3", None),
        ("at (?P<step>\\d+)", b"at 1764460800000000000", None),
        ("(?P<step>\\d+) (?P<loss>\\S+)", b"3 nan", Printed(3)),
        (EVERY, b"\x1b[A 50%|### | 10/1,000 loss=0.25 seen=640", Printed(10, 0.25, 640, 1000)),
    ],
)
def test_a_line_says_what_its_groups_are(pattern: str, line: bytes, found: Printed | None) -> None:
    assert ProgressPattern(pattern).find(line) == found


@pytest.mark.parametrize(
    "pattern", ["(?P<step>[0-9]+", "(?P<step>a)(?=b)", r"(?P<step>a)\1", "(?P<step>(a{1000}){1000})"]
)
def test_what_is_no_pattern_of_linear_time_is_refused_in_one_line(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        compiled(pattern)


def test_a_pattern_that_takes_other_engines_for_ever_takes_no_time() -> None:
    catastrophe = ProgressPattern("(?P<step>(a+)+)+(.*)*(.*)*b")
    begin = time.perf_counter()
    for _ in range(10):
        assert catastrophe.find(b"a" * output_reader.LONGEST_LINE) is None
    assert time.perf_counter() - begin < 5


def test_lines_are_whole_whatever_pieces_they_come_in() -> None:
    lines = Lines()
    text = b"one\ntwo\r\n\rthree\r\r\nfour"
    whole = list(Lines().feed(text))
    pieces = [line for byte in text for line in lines.feed(bytes([byte]))]
    assert whole == pieces == [b"one", b"two", b"three"]
    assert lines.end() == b"four"


def test_of_a_line_without_an_end_the_beginning_is_kept() -> None:
    lines = Lines()
    for _ in range(100):
        assert list(lines.feed(b"step 1 " + bytes(65536))) == []
    assert lines.end() == (b"step 1 " + bytes(65536))[: output_reader.LONGEST_LINE]


def read(*pieces: tuple[int, bytes], pattern: str = "step (?P<step>[0-9]+)") -> list[int]:
    found: list[Printed] = []
    reader = OutputReader(ProgressPattern(pattern), found.append)
    for stream, data in pieces:
        reader.feed(stream, data)
    reader.end()
    return [printed.step for printed in found]


def test_both_streams_are_read_each_by_its_own_lines() -> None:
    assert read((1, b"step "), (2, b"step 3\n"), (1, b"4\n"), (2, b"ste"), (1, b"step 5")) == [3, 4, 5]


def test_a_step_that_falls_is_left_out_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert read((1, b"step 1\nstep 9\nstep 1\nstep 2\nstep 9\nstep 10\n")) == [1, 9, 9, 10]


def test_a_program_that_prints_too_fast_loses_lines_here_and_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_reader, "MOST_PENDING", 1000)
    searching, go_on, found = threading.Event(), threading.Event(), list[int]()

    def report(printed: Printed) -> None:
        found.append(printed.step)
        searching.set()
        go_on.wait(20)

    reader = OutputReader(ProgressPattern("step (?P<step>[0-9]+)\\b"), report)
    reader.feed(1, b"step 1\nstep 2")
    assert searching.wait(20)
    for step in range(3000, 4000):
        reader.feed(1, b"%d\nstep " % step)
    reader.feed(1, b"5000\n")
    go_on.set()
    reader.end()
    assert found[0] == 1
    assert found[-1] == 5000
    assert len(found) < 200
    assert all(b - a == 1 for a, b in itertools.pairwise(found[1:-1])), "what is left has no gap"
    assert found[1] > 3500, "the newest lines are kept, and no line is made of two"


def report(step: int, samples: int = 0, *, loss: float | None = None, output: bool = True) -> dict[str, object]:
    total = None if loss is None else loss * (samples or 1)
    return {"type": "report", "step": step, "samples": samples, "loss": total, "generation": 1, "output": output}


def test_samples_that_every_process_prints_are_counted_once() -> None:
    reports = PrintedReports()
    counted = [reports.admit(rank, report(step, 32, loss=0.5)) for step in (1, 2) for rank in (1, 0, 2)]
    assert [message["samples"] for message in counted if message] == [32, 32, 0, 0, 32, 0]
    assert [message["loss"] for message in counted if message] == [16, 16, 0.5, 0.5, 16, 0.5]


def test_samples_of_the_last_rank_count_where_it_alone_prints() -> None:
    reports = PrintedReports()
    assert reports.admit(3, report(1, 32))["samples"] == 32  # type: ignore[index]
    # After a resize it is another one.
    again = reports.admit(5, report(2, 32) | {"generation": 2})
    assert again is not None
    assert again["samples"] == 32


def test_what_a_program_reports_itself_counts_and_not_what_it_prints() -> None:
    reports = PrintedReports()
    assert reports.admit(0, report(1)) is not None
    assert reports.admit(1, report(1, output=False)) is not None
    assert reports.admit(0, report(2)) is None


NOISE = r"""
import os, sys
os.write(1, b"partial \r 10%|#  | 1/10\r\x00\xff\xfe no end")
os.write(2, b"to stderr \xf0\x9f")
os.write(1, bytes(range(256)) * 1024)
"""


def test_the_output_passes_unchanged(tmp_path: Path) -> None:
    """Also what is no text, and what ends no line."""
    (tmp_path / "noise.py").write_text(NOISE)
    bare = subprocess.run([sys.executable, tmp_path / "noise.py"], capture_output=True, check=True)
    reading = (
        "import sys, threading\n"
        "from disttrain_trainer.runtime.output_reader import OutputReader, ProgressPattern\n"
        "from disttrain_trainer.runtime.subprocesses import Program\n"
        "changed = threading.Condition()\n"
        "reader = OutputReader(ProgressPattern('(?P<step>[0-9]+)/'), lambda printed: None)\n"
        "program = Program([sys.executable, 'noise.py'], [{}], changed=changed, readers=[reader])\n"
        "with changed: changed.wait_for(program.ended)\n"
    )
    read_by_us = subprocess.run([sys.executable, "-c", reading], cwd=tmp_path, capture_output=True, check=True)
    assert (read_by_us.stdout, read_by_us.stderr) == (bare.stdout, bare.stderr)
