"""Which buffers a part starts from, and which follow a step."""

import pytest
import torch
from torch import nn

from disttrain_trainer.errors import UserError
from disttrain_trainer.model.part_buffers import PartBuffers
from disttrain_trainer.parallel.shared_buffers import SharedBuffers


class Counting(nn.Module):
    """Buffers of several types, one of two names, and a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.target = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.backbone = nn.Parameter(torch.zeros(5), requires_grad=False)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.tensor(1 << 60))
        self.register_buffer("known", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.twice = self._buffers["again"] = self.mean

    def part(self, value: float, *, target: bool = True) -> None:
        with torch.no_grad():
            self.mean.add_(value)
            self.count += 1
            self.known[0] = True
            if target:
                self.target.fill_(value)


def test_each_part_starts_from_the_step_and_the_next_step_from_what_part_0_left() -> None:
    model = Counting()
    parts = PartBuffers(model)
    for step, base in enumerate((0.0, 1.0)):
        parts.begin()
        for part in range(3):
            if part:
                parts.restore()
            assert model.mean.tolist() == [base] * 3
            assert int(model.count) == (1 << 60) + step
            assert model.target.tolist() == [base] * 3
            model.part(1.0 + part if step == 0 else 5.0 + part)
            parts.left(step=step, part=part)
        parts.advance()
    assert model.mean.tolist() == [6.0] * 3
    assert int(model.count) == (1 << 60) + 2
    assert model.target.tolist() == [5.0] * 3
    assert dict(model.named_buffers(remove_duplicate=False))["again"] is model.mean


def test_another_process_takes_over_exactly_what_part_0_left() -> None:
    model, other = Counting(), Counting()
    parts = PartBuffers(model)
    parts.begin()
    model.part(2.5)
    parts.left(step=0, part=0)
    theirs = PartBuffers(other)
    theirs.take(parts.encoded())
    assert other.mean.tolist() == [2.5] * 3
    assert int(other.count) == (1 << 60) + 1
    assert other.known.tolist() == [True, False]
    assert other.target.tolist() == [2.5] * 3


def test_a_frozen_parameter_that_changes_late_is_refused_by_name() -> None:
    model = Counting()
    parts = PartBuffers(model)
    for step in range(2):
        parts.begin()
        model.part(1.0, target=step == 1)
        if step:
            with pytest.raises(UserError, match="parameter target, which is not trained, was changed in step 1"):
                parts.left(step=step, part=0)
        else:
            parts.left(step=step, part=0)
            parts.advance()


def test_all_ranks_take_over_the_bytes_of_rank_0() -> None:
    models = [Counting(), Counting()]
    ours, theirs = (SharedBuffers(model, torch.device("cpu")) for model in models)
    models[0].part(-0.0)
    models[0].mean[0] = float("nan")
    assert ours.pack(gives=True)
    assert theirs.pack(gives=False)
    theirs.bytes.copy_(ours.bytes)
    theirs.take()
    assert torch.equal(models[1].mean.view(torch.int32), models[0].mean.view(torch.int32)), "every bit"
    assert torch.equal(models[1].count, models[0].count)
    assert torch.equal(models[1].known, models[0].known)


def test_a_buffer_of_another_form_is_not_sent() -> None:
    model = Counting()
    shared = SharedBuffers(model, torch.device("cpu"))
    model.known = torch.zeros(3, dtype=torch.bool)
    assert not shared.pack(gives=True)
