"""A script's own loop, without servers: what it raises, what it hands over, and the state that it finds."""

import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from configs import config_of
from disttrain.api.names import Role
from disttrain_trainer.checkpoint import store, tensor_file
from disttrain_trainer.checkpoint.background import BackgroundWriter
from disttrain_trainer.checkpoint.script_state import StateOfScript, read_state
from disttrain_trainer.errors import UserError
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import ParameterServerMember
from disttrain_trainer.runtime import machine
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.strategies import own_loop, parameter_server
from disttrain_trainer.strategies.own_loop import OwnLoop
from disttrain_trainer.strategies.turns import FIRST_STEPS, Turns
from training.job import digits, served


class Worker:
    """In place of that of the servers: it has the state that is to be saved, and fails at once."""

    def __init__(self, *, state: StateOfScript, **_: Any) -> None:
        made.append(state)

    def run(self) -> None:
        raise UserError("it failed")


made: list[StateOfScript] = []


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OwnLoop:
    monkeypatch.setattr(own_loop, "ScriptWorker", Worker)
    made.clear()
    spec = digits(**served("Sync"))
    kept = {name: spec["trainer"][name] for name in ("optimizer", "batchSize")}
    spec["trainer"] = {**kept, "script": {"file": "train.py"}, "maxSteps": 5}
    process = SimpleNamespace(
        config=config_of(spec), machine_rank=0, rank=0, incarnation="a", checkpoint_dir=tmp_path, model_dir=None
    )
    nothing: Any = SimpleNamespace()
    return OwnLoop(process=process, metrics=nothing, control=nothing, member=nothing)  # type: ignore[arg-type]


def begin(own: OwnLoop) -> Any:
    own.adopt(nn.Linear(1, 1))
    return own.batches([(torch.ones(1), 0)] * 64, None, None)


def test_what_ended_the_training_ends_a_script_that_has_caught_it(own: OwnLoop) -> None:
    batches = begin(own)
    with pytest.raises(UserError, match="it failed"):
        next(batches)
    with pytest.raises(UserError, match="it failed"):
        own.finish()


@pytest.mark.parametrize(
    ("loss", "weight", "said"),
    [
        (torch.ones(2), None, r"got a tensor of shape \(2,\); expected the batch's mean loss"),
        ("x", None, "got a str; expected the batch's mean loss"),
        (None, "x", "got the weight 'x'; expected a number of 0 or more"),
        (None, torch.ones(2), "got the weight tensor"),
        (None, -1.0, "got the weight -1.0"),
        (None, float("nan"), "got the weight nan"),
        (torch.ones(()), 2, r"ps\.step\(\) was called without a batch"),
    ],
)
def test_what_is_no_loss_and_no_weight_is_refused(own: OwnLoop, loss: Any, weight: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        own.step(loss, weight)


def test_the_trainers_handler_of_sigterm_is_put_back(own: OwnLoop) -> None:
    end = machine.on_sigterm(lambda: None)
    try:
        ours = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *_: None)
        with pytest.raises(UserError, match="without a batch"):
            own.step(None, None)
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        end()


def test_a_weight_of_a_micro_batch_is_refused(own: OwnLoop) -> None:
    with own.no_sync(), pytest.raises(UserError, match=r"a weight within no_sync\(\)"):
        own.step(None, 3)


def test_what_was_found_goes_with_the_next_checkpoint_and_a_pruned_one_is_not_read(
    own: OwnLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = StateOfScript()
    earlier.keep({"batches": 4})
    (tmp_path / "step-4").mkdir()
    tensor_file.write(tmp_path / "step-4" / "buffers", earlier.tensors())
    manifest = SimpleNamespace(file_of=lambda _: "buffers")
    found = [SimpleNamespace(folder=tmp_path / name, manifest=manifest) for name in ("step-4", "step-2")]
    monkeypatch.setattr(store, "newest", lambda *_: SimpleNamespace(checkpoint=found.pop()))
    assert own.restore() == {"batches": 4}
    begin(own)
    tensor_file.write(tmp_path / "again", made[0].tensors())
    assert read_state(tmp_path / "again") == {"batches": 4}


def test_a_worker_that_is_released_has_written_its_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = list[BackgroundWriter]()
    monkeypatch.setattr(BackgroundWriter, "wait", lambda writer: waited.append(writer))
    process = Process(config=config_of(digits(**served("Sync"))), role=Role.WORKER, index=0, checkpoint_dir=tmp_path)
    control = ControlClient(process=process, describe=dict, on_message=lambda _: None, on_released=lambda: None)
    parameter_server.Worker(process=process, metrics=Metrics(process), control=control, member=ParameterServerMember())
    control.before_release()
    assert len(waited) == 1


def steps(reached: list[bool]) -> None:
    """A script computes a batch for each of these, and the backward of some reaches the model. Raises as the worker's loop."""
    turns = Turns()

    def script() -> None:
        while turns.next():
            turns.step(None, None)

    thread = threading.Thread(target=script)
    thread.start()
    try:
        for reaches in reached:
            turns("batch", 1)
            if not reaches:
                turns.learned_nothing()
    finally:
        turns.end(None)
        thread.join()


def test_only_a_training_that_learns_nothing_from_the_first_batch_on_is_refused() -> None:
    steps([False] * (FIRST_STEPS - 1) + [True] + [False] * 5)
    steps([True] + [False] * 5)
    with pytest.raises(UserError, match="no gradient in the model"):
        steps([False] * FIRST_STEPS)
