"""Saves in the background: what is copied stays as it was, and no failure is lost."""

import os
import threading

import pytest
import torch

from disttrain_trainer.checkpoint.background import BackgroundWriter, HostCopy
from disttrain_trainer.checkpoint.tensors import is_finite
from disttrain_trainer.runtime import machine


def test_a_copy_stays_as_it_was_and_its_memory_is_used_again() -> None:
    copy, tensors = HostCopy(), {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.tensor(7)}
    first = copy.take(tensors)
    tensors["a"].zero_()
    assert first["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert first["a"].is_contiguous()
    assert first["b"].item() == 7
    second = copy.take(tensors)
    assert [second[name].data_ptr() for name in tensors] == [first[name].data_ptr() for name in tensors]
    assert not second["a"].any()


def test_a_tensor_that_has_grown_or_is_new_gets_memory_of_its_own_and_one_that_is_gone_is_left_out() -> None:
    copy = HostCopy()
    first = copy.take({"grows": torch.ones(2), "goes": torch.ones(1)})
    second = copy.take({"grows": torch.ones(3), "new": torch.ones(1, dtype=torch.int8)})
    assert {name: tuple(tensor.shape) for name, tensor in second.items()} == {"grows": (3,), "new": (1,)}
    assert first["grows"].tolist() == [1, 1]


def test_a_second_task_waits_for_the_first() -> None:
    writer, go, done = BackgroundWriter(), threading.Event(), list[str]()

    def first() -> None:
        go.wait(10)
        done.append("first")

    writer.start(first)
    assert writer.busy
    threading.Timer(0.05, go.set).start()
    writer.start(lambda: done.append("second"))
    assert done[0] == "first"
    writer.wait()
    assert done == ["first", "second"]
    assert not writer.busy


def test_what_the_work_fails_with_is_raised_once() -> None:
    writer = BackgroundWriter()
    writer.start(lambda: 1 // 0)
    writer.wait()
    with pytest.raises(ZeroDivisionError):
        writer.check()
    writer.check()
    writer.start(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        writer.start(lambda: None)


def test_the_thread_that_writes_gives_way_to_the_steps() -> None:
    writer, found = BackgroundWriter(), list[int]()
    before = os.getpriority(os.PRIO_PROCESS, 0)
    writer.start(lambda: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
    writer.wait()
    assert found == [machine.BACKGROUND]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_one_element_that_is_no_number_is_found_and_a_sum_that_overflows_is_none(
    dtype: torch.dtype, wrong: float
) -> None:
    vector = torch.full(((1 << 20) + 5,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(vector)
    vector[-1] = wrong
    assert not is_finite(vector)
    vector[:2] = torch.tensor([float("inf"), float("-inf")])
    vector[-1] = 0
    assert not is_finite(vector)
    assert is_finite(torch.empty(0, dtype=dtype))
