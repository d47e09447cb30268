"""How often the callbacks for other trainers report, and how many samples."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from disttrain_trainer import session
from disttrain_trainer.integrations.pace import REPORT_SECONDS, Pace, batch_size


class Unread:
    """A loss on a device: to read it waits for the device."""

    def __float__(self) -> float:
        raise AssertionError("it is not the time to report")


def test_samples_between_two_reports_are_added_up_and_losses_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(session, "report", lambda **report: said.append({**report, "loss": float(report["loss"])}))
    now = [0.0]
    pace = Pace(clock=lambda: now[0])
    for step in range(1, 11):
        now[0] += REPORT_SECONDS / 4
        due = step in (1, 5, 9, 10)
        pace.report(step=step, loss=0.5 if due else Unread(), samples=32, total_steps=10, last=step == 10)
    assert [(report["step"], report["samples"]) for report in said] == [(1, 32), (5, 128), (9, 128), (10, 32)]


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(4, 2), 4),
        ([torch.zeros(4, 2), torch.zeros(4)], 4),
        ({"labels": None, "input_ids": torch.zeros(3, 8)}, 3),
        (({"x": [torch.zeros(5)]},), 5),
        (torch.zeros(()), 0),
        (["a", "b"], 0),
        ("text", 0),
        (None, 0),
    ],
)
def test_the_size_of_a_batch_is_that_of_its_first_tensor(batch: object, size: int) -> None:
    assert batch_size(batch) == size


def test_the_integrations_need_no_library_until_one_is_imported() -> None:
    code = "import sys, disttrain_trainer.integrations.pace; sys.exit(bool({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
