"""The work queue, with time that stands still: the loop's clock is turned by hand."""

from __future__ import annotations

import asyncio

import pytest

from disttrain.controller.queue import FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS, ShutDown, WorkQueue
from unit.controller.hand_turned import hand_turned, now


@hand_turned
async def test_key_added_often_is_handed_out_once() -> None:
    queue: WorkQueue[str] = WorkQueue()
    for _ in range(5):
        queue.add("a")
    assert await queue.get() == "a"
    assert len(queue) == 0


@hand_turned
async def test_key_in_work_is_never_handed_to_a_second_worker() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    await queue.get()
    queue.add("a")
    second = asyncio.ensure_future(queue.get())
    await asyncio.sleep(0)
    assert not second.done()
    queue.done("a")
    assert await second == "a"


@hand_turned
async def test_keys_are_handed_out_in_the_order_of_their_first_adding() -> None:
    queue: WorkQueue[str] = WorkQueue()
    for key in "abca":
        queue.add(key)
    assert [await queue.get() for _ in range(3)] == ["a", "b", "c"]


@hand_turned
async def test_waiting_workers_are_woken_one_for_each_key() -> None:
    queue: WorkQueue[str] = WorkQueue()
    workers = [asyncio.ensure_future(queue.get()) for _ in range(3)]
    await asyncio.sleep(0)
    queue.add("a")
    queue.add("b")
    done, waiting = await asyncio.wait(workers, timeout=1)
    assert sorted(worker.result() for worker in done) == ["a", "b"]
    assert len(waiting) == 1
    waiting.pop().cancel()


@hand_turned
async def test_wake_up_of_a_cancelled_worker_goes_to_another() -> None:
    queue: WorkQueue[str] = WorkQueue()
    first, second = (asyncio.ensure_future(queue.get()) for _ in range(2))
    await asyncio.sleep(0)
    queue.add("a")
    first.cancel()
    assert await second == "a"


@hand_turned
async def test_of_several_timers_the_earliest_counts() -> None:
    queue: WorkQueue[str] = WorkQueue()
    start = now()
    queue.add_after("a", 60)
    queue.add_after("a", 5)
    queue.add_after("a", 30)
    await queue.get()
    assert now() - start == pytest.approx(5)


@hand_turned
async def test_pass_ends_the_timer_that_was_set_before_it() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add_after("a", 60)
    queue.add("a")
    await queue.get()
    queue.done("a")
    queue.add_after("b", 3600)
    assert await queue.get() == "b"


@hand_turned
async def test_failures_wait_longer_each_time_and_up_to_a_limit() -> None:
    queue: WorkQueue[str] = WorkQueue(jitter=lambda: 0.5)
    waits = []
    for _ in range(12):
        start = now()
        queue.add_rate_limited("a")
        await queue.get()
        queue.done("a")
        waits.append(now() - start)
    assert waits[:3] == pytest.approx([FIRST_BACKOFF_SECONDS, 2 * FIRST_BACKOFF_SECONDS, 4 * FIRST_BACKOFF_SECONDS])
    assert waits[-1] == pytest.approx(LONGEST_BACKOFF_SECONDS)
    queue.forget("a")
    start = now()
    queue.add_rate_limited("a")
    await queue.get()
    assert now() - start == pytest.approx(FIRST_BACKOFF_SECONDS)


@hand_turned
async def test_age_of_the_oldest_tells_of_workers_that_hang() -> None:
    queue: WorkQueue[str] = WorkQueue()
    assert queue.oldest() == 0
    queue.add("a")
    await asyncio.sleep(7)
    assert queue.oldest() == pytest.approx(7)


@hand_turned
async def test_shut_down_lets_go_of_every_worker_and_takes_nothing_more() -> None:
    queue: WorkQueue[str] = WorkQueue()
    workers = [asyncio.ensure_future(queue.get()) for _ in range(3)]
    await asyncio.sleep(0)
    queue.add_after("later", 5)
    queue.shut_down()
    results = await asyncio.gather(*workers, return_exceptions=True)
    assert all(isinstance(result, ShutDown) for result in results)
    queue.add("a")
    with pytest.raises(ShutDown):
        await queue.get()


@hand_turned
async def test_key_that_is_held_comes_then_and_not_before() -> None:
    queue: WorkQueue[str] = WorkQueue()
    began = now()
    queue.add("a")
    await queue.get()
    queue.add("a")  # news that came while it was in work
    queue.hold("a", 5)
    queue.done("a")
    queue.add("a")
    queue.add_after("a", 1)
    assert len(queue) == 0
    assert (await queue.get(), now() - began) == ("a", 5)
    queue.done("a")
    queue.add("a")
    assert (await queue.get(), now() - began) == ("a", 5)


@hand_turned
async def test_no_job_is_held_for_longer_than_a_back_off() -> None:
    queue: WorkQueue[str] = WorkQueue()
    began = now()
    queue.hold("a", 86_400)
    assert (await queue.get(), now() - began) == ("a", LONGEST_BACKOFF_SECONDS)
