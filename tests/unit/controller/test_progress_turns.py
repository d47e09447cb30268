"""All jobs share the writes for progress alone, and take turns."""

from __future__ import annotations

import asyncio

import pytest

from disttrain.controller.progress_turns import PROGRESS_WRITES_PER_SECOND, ProgressTurns
from disttrain.controller.record import JobRecord
from unit.controller.fake_api import JOB
from unit.controller.fake_cluster import operated
from unit.controller.hand_turned import hand_turned, now


@hand_turned
async def test_jobs_have_their_turns_in_their_order_and_no_more_in_a_second_than_the_rate() -> None:
    turns, records = ProgressTurns(), [JobRecord(str(number)) for number in range(100)]
    moments = [turns.of(record) for record in records]
    assert moments[0] == now(), "a job alone waits for nothing"
    assert moments == sorted(moments)
    assert moments[-1] - moments[0] == pytest.approx(99 / PROGRESS_WRITES_PER_SECOND)
    assert [turns.of(record) for record in records] == moments, "a turn stays until the status is written"
    records[0].wrote_status(now())
    assert turns.of(records[0]) > moments[-1], "the others come first"
    await asyncio.sleep(60)
    records[1].wrote_status(now())
    assert turns.of(records[1]) == now(), "what nobody used is not saved up"


@hand_turned
async def test_turn_ends_with_a_pass_that_has_nothing_to_write() -> None:
    async with operated() as (_, operator):
        await asyncio.sleep(60)
        record = operator.records.find(JOB)
        assert record
        record.progress_waits(now())
        operator.queue.add(JOB)
        await asyncio.sleep(1)
        assert record.progress_turn is None
