"""What a process says of a wait, and what ends it when nothing comes."""

import logging
from pathlib import Path

import pytest

from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain.api.trainer import Script, Trainer
from disttrain_trainer.errors import PeerLost
from disttrain_trainer.net import control_client as control
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import Round
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.strategies import script as agent
from disttrain_trainer.strategies.script import Agent
from unit.trainer.configs import command_config


def worker(config: JobConfig) -> Process:
    return Process(config=config, role=Role.WORKER, index=0)


def impatient(seconds: float, **changes: object) -> JobConfig:
    """It declares its master lost after so many seconds; no process listens at its address."""
    return command_config().model_copy(update={"startup_timeout_seconds": seconds, **changes})


def connection(config: JobConfig) -> ControlClient:
    return ControlClient(
        process=worker(config), describe=dict, on_message=lambda message: None, on_released=lambda: None
    )


def test_a_wait_that_ran_out_names_what_it_was_for() -> None:
    with pytest.raises(PeerLost, match=r"the others: waited 0\.01 s; the master was not asked yet"):
        connection(command_config()).wait(lambda: None, what="the others", timeout=0.01)


def test_a_wait_without_a_deadline_ends_when_the_master_is_given_up() -> None:
    lonely = connection(impatient(0.05))
    lonely.start()
    with pytest.raises(PeerLost, match=r"master \(127\.0\.0\.1:9\): waited 0\.05 s for it"):
        lonely.wait(lambda: None, what="the others", timeout=None)


@pytest.mark.parametrize(("logged", "lines"), [(False, ["waiting for the others"]), (True, [])])
def test_a_long_wait_says_once_what_it_is_for(
    logged: bool, lines: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(control, "QUIET_WAIT_SECONDS", 0)
    answers = iter([None, None, "they came"])
    with caplog.at_level(logging.INFO, control.log.name):
        waiting = connection(command_config())
        waiting.changed.wait = lambda timeout: True  # type: ignore[method-assign]  # a message comes
        assert waiting.wait(lambda: next(answers), what="the others", timeout=None, logged=logged) == "they came"
        assert waiting.wait(lambda: "here", what="those who are here", timeout=None) == "here"
    assert [record.message for record in caplog.records] == lines


def test_an_agent_whose_master_does_not_judge_the_failure_of_its_script_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(agent, "PEER_LOSS_NOTICE_SECONDS", 0)
    Path("train.py").write_text("raise SystemExit(3)")
    script = Script(file="train.py")
    process = worker(impatient(0.05, trainer=Trainer(script=script)))
    alone = Agent(process, script, Metrics(process))
    alone.rank.round = this_round = Round(1)
    with pytest.raises(PeerLost, match="the master to decide which member failed first"):
        alone.run_in(this_round)
