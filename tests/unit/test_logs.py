"""Lines of many processes as one log: in the order of time, none lost, none shown twice."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from disttrain.api.names import Role
from disttrain.logs import SECOND, LogLine, Selection, Shown, TimeOrder, last_state, stamped

NOON = int(datetime(2026, 11, 30, 12, tzinfo=UTC).timestamp())


def line(time: int, text: str = "") -> LogLine:
    return LogLine(Role.WORKER, 0, time, text or str(time))


@pytest.mark.parametrize(
    ("given", "nanoseconds", "text"),
    [
        pytest.param(b"2026-11-30T12:00:00.123456789Z a b", 123456789, b"a b", id="nanoseconds"),
        pytest.param(b"2026-11-30T13:00:00.5+01:00 a", 500_000_000, b"a", id="another time zone"),
        pytest.param(b"2026-11-30T12:00:00Z ", 0, b"", id="an empty line"),
        pytest.param(b"2026-11-30T12:00:00Z  x", 0, b" x", id="a line that begins with a space"),
    ],
)
def test_the_time_of_a_line_is_read_to_the_nanosecond(given: bytes, nanoseconds: int, text: bytes) -> None:
    assert stamped(given) == (NOON * SECOND + nanoseconds, text)


@pytest.mark.parametrize("given", [b"no time", b"", b"2026-13-30T12:00:00Z x"])
def test_a_line_without_a_time_is_kept_as_it_is(given: bytes) -> None:
    assert stamped(given) == (None, given)


def test_a_log_that_is_read_again_from_its_last_second_shows_each_line_once() -> None:
    shown = Shown()
    assert shown.since == ""
    lines = [(b"a", 1), (b"b", 2), (b"b", 2), (b"c", 2)]
    assert all(shown.is_new(text, (NOON + second) * SECOND) for text, second in lines)
    assert shown.since == "2026-11-30T12:00:02Z"
    shown.ask_again()
    again = [b"b", b"b", b"c", b"b"]  # the kubelet repeats the second, which has got one more line, equal to two others
    assert [shown.is_new(text, (NOON + 2) * SECOND) for text in again] == [False, False, False, True]


def test_a_clock_that_is_set_back_loses_no_line() -> None:
    shown = Shown()
    for text, second in ((b"a", 5), (b"b", 3)):
        assert shown.is_new(text, (NOON + second) * SECOND)
    assert shown.since == "2026-11-30T12:00:03Z"
    shown.ask_again()
    assert [shown.is_new(text, NOON * SECOND) for text in (b"a", b"b", b"c")] == [False, False, True]


def test_logs_that_are_caught_up_are_merged_by_time_however_they_come() -> None:
    order = TimeOrder(patience=1.0)
    for source in "ab":
        order.open(source)
    for time in (1, 4, 6):
        order.put("a", line(time), now=0)
    assert order.take(now=0.5) == []  # b may still bring an earlier one
    for time in (2, 3, 5):
        order.put("b", line(time), now=0.5)
    assert [one.time for one in order.take(now=0.5)] == [1, 2, 3, 4, 5]
    order.close("b")
    assert [one.time for one in order.take(now=0.5)] == [6]


def test_a_process_that_prints_nothing_holds_the_others_up_for_a_moment_only() -> None:
    order = TimeOrder(patience=1.0)
    for source in "ab":
        order.open(source)
    order.put("a", line(1), now=10)
    assert (order.take(now=10.9), order.due()) == ([], 11)
    assert [one.time for one in order.take(now=11)] == [1]
    assert order.due() is None


@pytest.mark.parametrize(
    ("selection", "role", "index", "processes", "taken"),
    [
        (Selection(), Role.MASTER, 0, 1, True),
        (Selection(ranks={3}), Role.WORKER, 3, 1, True),
        (Selection(ranks={3}), Role.WORKER, 1, 2, True),
        (Selection(ranks={0}), Role.MASTER, 0, 1, False),
        (Selection([Role.PARAMETER_SERVER], {1}), Role.PARAMETER_SERVER, 1, 2, True),
        (Selection([Role.MASTER]), Role.WORKER, 0, 1, False),
    ],
)
def test_ranks_are_those_of_the_training_where_no_role_is_named(
    selection: Selection, role: Role, index: int, processes: int, taken: bool
) -> None:
    assert selection.takes(role, index, processes) is taken


def test_of_a_line_that_a_progress_bar_rewrote_the_last_state_is_shown() -> None:
    assert last_state(b"10%\r20%\r") == "20%"
    assert last_state(b"\xff") == "�"
