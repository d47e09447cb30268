"""Masters that do not answer delay the reading of those that do by seconds at most, however many they are."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import defaultdict

import pytest

from disttrain.controller.cache import Key
from disttrain.controller.progress import (
    LONGEST_PAUSE_SECONDS,
    TIMEOUT_SECONDS,
    Master,
    ProgressReader,
    Unreadable,
    pause,
)
from unit.controller.hand_turned import hand_turned, now

REPORT = json.dumps({"attempt": 1, "step": 1}).encode()
INTERVAL = 5.0


def master(name: str, namespace: str = "team") -> Master:
    return Master(namespace=namespace, pod=name, uid=name, ip="10.0.0.1", port=9400, interval=INTERVAL)


class Masters:
    """Masters by name, and when each was asked and answered."""

    def __init__(self) -> None:
        self.silent: set[str] = set()
        self.refusing: set[str] = set()
        self.garbage: set[str] = set()
        self.seconds: dict[str, float] = {}
        """That an answer takes."""
        self.asked: dict[str, list[float]] = defaultdict(list)
        self.answered: dict[str, list[float]] = defaultdict(list)
        self.reader = ProgressReader(self.fetch, lambda _, master, __: self.answered[master.pod].append(now()))

    async def fetch(self, master: Master) -> bytes:
        self.asked[master.pod].append(now())
        if master.pod in self.refusing:
            raise Unreadable("connection refused")
        await asyncio.sleep(3600 if master.pod in self.silent else self.seconds.get(master.pod, 0.005))
        return b'{"step": "many"}' if master.pod in self.garbage else REPORT

    def follow(self, name: str, namespace: str = "team") -> None:
        self.reader.follow(Key(namespace, name), master(name, namespace))

    async def read_for(self, seconds: float) -> None:
        """Time passes, and then nothing is read any more."""
        await asyncio.sleep(seconds)
        await self.reader.close()

    def longest_gap(self, names: set[str], *, since: float) -> float:
        """The longest time for which one of them did not answer."""
        gaps = []
        for name in names:
            times = [since, *(time for time in self.answered[name] if time >= since), now()]
            gaps.append(max(later - earlier for earlier, later in itertools.pairwise(times)))
        return max(gaps)


def many(number: int) -> list[str]:
    return [f"master-{index}" for index in range(number)]


@pytest.mark.parametrize("silent", [640, 900])
@hand_turned
async def test_masters_that_answer_are_read_every_few_seconds_beside_many_that_never_do(silent: int) -> None:
    masters = Masters()
    names = many(1000)
    masters.silent = set(names[:silent])
    began = now()
    for name in names:
        masters.follow(name)
    await masters.read_for(180)
    assert masters.longest_gap(set(names[silent:]), since=began) < 2 * INTERVAL


@hand_turned
async def test_masters_that_fall_silent_at_once_delay_the_others_once_and_by_seconds() -> None:
    masters = Masters()
    names = many(1000)
    for name in names:
        masters.follow(name)
    await asyncio.sleep(60)
    masters.silent = set(names[:900])
    cut = now()
    await masters.read_for(180)
    assert masters.longest_gap(set(names[900:]), since=cut) < 2.5 * INTERVAL


@hand_turned
async def test_master_that_answers_again_is_read_within_half_of_a_minute() -> None:
    masters = Masters()
    masters.silent = {"digits"}
    masters.follow("digits")
    await asyncio.sleep(600)
    masters.silent.clear()
    back = now()
    await masters.read_for(LONGEST_PAUSE_SECONDS + TIMEOUT_SECONDS + 1)
    assert masters.answered["digits"][0] - back <= LONGEST_PAUSE_SECONDS + TIMEOUT_SECONDS


@hand_turned
async def test_busy_master_is_read_although_its_answer_takes_two_seconds() -> None:
    masters = Masters()
    masters.seconds["digits"] = 2.0
    masters.follow("digits")
    await masters.read_for(20)
    assert masters.answered["digits"]


@hand_turned
async def test_master_that_starts_and_refuses_is_asked_at_every_interval() -> None:
    masters = Masters()
    masters.refusing = {"digits"}
    masters.follow("digits")
    await masters.read_for(61)
    assert len(masters.asked["digits"]) == 13


@hand_turned
async def test_master_that_answers_with_garbage_is_asked_seldom() -> None:
    masters = Masters()
    masters.garbage = {"digits"}
    masters.follow("digits")
    await masters.read_for(121)
    assert len(masters.asked["digits"]) <= 8


@hand_turned
async def test_slow_masters_of_one_namespace_do_not_delay_those_of_another() -> None:
    masters = Masters()
    for name in many(2000):
        masters.seconds[name] = 0.99  # it answers, as late as it may
        masters.follow(name, "flood")
    masters.follow("digits", "team")
    began = now()
    await masters.read_for(60)
    assert masters.longest_gap({"digits"}, since=began) < 2 * INTERVAL


def test_pauses_of_a_silent_master_double_up_to_half_a_minute() -> None:
    assert [pause(5.0, silences) for silences in range(7)] == [5, 5, 10, 20, 30, 30, 30]
    assert pause(10.0, 4000) == LONGEST_PAUSE_SECONDS
