"""The batches of local steps, and the portions of gradient accumulation: every sample of a part once, in its order."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from disttrain_trainer.data.inner_batches import inner_batches
from disttrain_trainer.data.schedule import Schedule


@given(
    samples=st.integers(1, 200),
    batch_size=st.integers(1, 64),
    parts=st.integers(1, 5),
    steps=st.integers(2, 9),
    data=st.data(),
)
def test_each_sample_of_a_part_is_in_one_batch_and_none_is_empty(
    samples: int, batch_size: int, parts: int, steps: int, data: st.DataObject
) -> None:
    schedule = Schedule(samples=samples, batch_size=batch_size, parts_per_step=parts, seed=0, epochs=2)
    part = schedule.part(data.draw(st.integers(0, schedule.total_parts - 1)))
    if not part.samples:
        return
    full = batch_size // parts
    batches = inner_batches(part, steps, full)
    assert np.array_equal(np.concatenate([batch.indices for batch in batches]), part.indices)
    assert [batch.batch for batch in batches] == list(range(len(batches)))
    assert [batch.is_last for batch in batches] == [False] * (len(batches) - 1) + [True]
    assert all(batch.samples == len(batch.indices) > 0 for batch in batches)
    assert {(batch.index, batch.step, batch.epoch) for batch in batches} == {(part.index, part.step, part.epoch)}
    assert max(batch.samples for batch in batches) - min(batch.samples for batch in batches) <= 1
    if part.samples >= steps * 2:
        assert len(batches) == steps
    if full >= 2 * steps and part.samples > 1:
        assert min(batch.samples for batch in batches) >= 2, "BatchNorm cannot train on one sample"
