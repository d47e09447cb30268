"""Asking several sources at once: the first answer counts, and one that is silent is not waited for."""

from __future__ import annotations

import threading

import pytest

from disttrain_trainer.data.first_answer import first_answer


def test_the_first_source_that_has_it_answers_and_the_others_are_not_asked() -> None:
    asked: list[int] = []

    def source(number: int, answer: str | None) -> str | None:
        asked.append(number)
        return answer

    calls = [lambda: source(0, None), lambda: source(1, "here"), lambda: source(2, "here, too")]
    assert first_answer(calls, after=60, within=60) == "here"
    assert asked == [0, 1]


def test_a_silent_source_is_not_waited_for() -> None:
    silent = threading.Event()
    try:
        assert first_answer([silent.wait, lambda: True], after=0.01, within=60) is True
    finally:
        silent.set()


def test_a_slow_source_may_still_be_the_one_that_has_it() -> None:
    asked = threading.Event()

    def slow() -> str:
        asked.wait(60)
        return "late"

    def nothing() -> None:
        asked.set()

    assert first_answer([slow, nothing], after=0.01, within=60) == "late"


def test_a_failure_counts_where_none_has_it() -> None:
    def fails() -> str:
        raise OSError("the volume")

    assert first_answer([fails, lambda: "a copy"], after=60, within=60) == "a copy"
    with pytest.raises(OSError, match="the volume"):
        first_answer([fails, lambda: None], after=60, within=60)
    assert first_answer([lambda: None], after=60, within=60) is None
    assert first_answer([], after=60, within=60) is None


def test_silence_of_all_ends() -> None:
    silent = threading.Event()
    try:
        with pytest.raises(TimeoutError, match=r"no answer for 0\.05 s"):
            first_answer([silent.wait], after=0.01, within=0.05)
    finally:
        silent.set()
