"""Operator and trainer of different releases: what one says, the other reads as far as it understands it, and no further."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import BaseModel, create_model

from disttrain.api import JobConfig, Progress, Termination, environment
from disttrain.api.base import Model
from disttrain.api.policies import Tls
from disttrain.api.reading import NotReadable, read, sentences
from disttrain.api.runtime import Addresses
from disttrain.api.strategy import Strategy
from disttrain.api.trainer import Trainer
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.parameter_server.identity import config_digest
from disttrain_trainer.runtime.process import Process
from unit.trainer.configs import command_config

REPORT: dict[str, Any] = {"attempt": 1, "step": 41, "totalSteps": 90, "loss": 0.5, "worldSize": 2}


def environ(**more: Any) -> dict[str, str]:
    config = json.loads(command_config().encode())
    config |= more
    return {environment.JOB: json.dumps(config), environment.ROLE: "worker"}


def test_configuration_of_a_later_operator_is_read_and_its_new_fields_are_named() -> None:
    config = json.loads(command_config().encode())
    config["trainer"]["compileMode"] = "Fast"
    config["shelves"] = {"a": 1}
    process = Process.read({environment.JOB: json.dumps(config), environment.ROLE: "worker"})
    assert process.unknown == ("trainer.compileMode", "shelves")
    assert process.config == command_config()


def test_a_roll_back_is_an_attempt_and_a_step() -> None:
    assert Process.read(environ() | {environment.ROLL_BACK: "3:120"}).roll_back == (3, 120)
    assert Process.read(environ()).roll_back is None
    with pytest.raises(WrongInput, match="DISTTRAIN_ROLL_BACK: 'x' is no attempt and step; expected such as 3:120"):
        Process.read(environ() | {environment.ROLL_BACK: "x"})


def test_value_that_the_trainer_does_not_understand_is_refused_in_one_line() -> None:
    strategy = {"type": "Swarm"}
    with pytest.raises(WrongInput) as refused:
        Process.read(environ(strategy=strategy))
    assert str(refused.value).startswith("DISTTRAIN_JOB: strategy.type: Input should be 'DataParallel'")
    assert "\n" not in str(refused.value)


def test_configuration_holds_no_defaults_so_that_an_older_trainer_meets_no_field_that_the_job_does_not_use() -> None:
    config = json.loads(command_config().encode())
    assert "seed" not in config["trainer"]
    assert "peerTimeoutSeconds" not in config
    assert JobConfig.decode(json.dumps(config)) == (command_config(), ())


def test_configuration_of_an_earlier_operator_with_every_default_in_it_is_the_same() -> None:
    text = command_config().model_dump_json(by_alias=True, exclude_none=True)
    assert JobConfig.decode(text) == (command_config(), ())


def test_decimals_of_an_earlier_operator_are_numbers_for_the_trainer_and_stay_the_text_that_they_are() -> None:
    """Release 0.1.0 sent strings. A pod that is made again in an attempt of that release gets the same ones."""
    optimizer = {"name": "Adam", "learningRate": "1e-4", "weightDecay": "0", "beta1": "0.90", "epsilon": "1e-8"}
    trainer = {"model": "a:b", "dataset": "a:c", "epochs": 1, "optimizer": optimizer}
    config = Process.read(environ(trainer=trainer)).config
    numbers = config.trainer.optimizer
    assert numbers
    assert (numbers.learning_rate, numbers.weight_decay, numbers.beta1, numbers.epsilon) == (1e-4, 0, 0.9, 1e-8)
    del optimizer["weightDecay"]  # as every value that is the default
    assert json.loads(config.encode())["trainer"] == trainer


def test_processes_of_two_releases_agree_on_a_job_that_uses_no_new_field() -> None:
    class Later(JobConfig):
        """A configuration with a field more."""

        data_plane: str = "tcp"

    config = command_config()
    later = Later.model_validate(config.model_dump())
    assert config_digest(later) == config_digest(config)


def served_config(**policy: Any) -> JobConfig:
    strategy = {"type": "ParameterServer", "parameterServer": policy}
    return command_config().model_copy(update={"strategy": Strategy.model_validate(strategy)})


def loop_config(**trainer: Any) -> JobConfig:
    names = {"model": "m:m", "dataset": "m:d", "optimizer": {"name": "SGD", "learningRate": 0.1}, "epochs": 1}
    return command_config().model_copy(update={"trainer": Trainer.model_validate(names | trainer)})


NEWER = [
    pytest.param(command_config().model_copy(update={"min_workers": 1}), "worker.elastic is set", id="elastic"),
    pytest.param(command_config().model_copy(update={"tls": Tls.MUTUAL}), "network.tls is Mutual", id="TLS"),
    pytest.param(served_config(consistency="Sync", replication=2), "replication is above 1", id="copies of shards"),
    pytest.param(
        served_config(consistency="Sync", localSteps=4, outerOptimizer={}), "localSteps is above 1", id="local steps"
    ),
    pytest.param(
        served_config(consistency="Sync", compression={"type": "BFloat16"}), "compression is BFloat16", id="compression"
    ),
    pytest.param(
        served_config(consistency="Async", staleLearningRate="Inverse"), "staleLearningRate is Inverse", id="stale rate"
    ),
    pytest.param(loop_config(precision="BFloat16"), "precision is BFloat16", id="precision"),
    pytest.param(loop_config(maxGradientNorm=1.0), "trainer.maxGradientNorm is set", id="clip"),
    pytest.param(loop_config(nanPolicy={"rollBacks": 1}), "trainer.nanPolicy is set", id="roll-backs"),
    pytest.param(loop_config(hooks="m:H"), "trainer.hooks is set", id="hooks"),
    pytest.param(
        loop_config(gradientAccumulationSteps=2), "gradientAccumulationSteps is set", id="gradient accumulation"
    ),
    pytest.param(
        loop_config(learningRateSchedule={"type": "Cosine"}), "learningRateSchedule is set", id="learning rate schedule"
    ),
    pytest.param(
        loop_config(optimizer={"name": "SGD", "learningRate": 0.1, "groups": [{"match": "b", "weightDecay": 0}]}),
        "optimizer.groups is set",
        id="groups",
    ),
    pytest.param(loop_config(optimizer={"factory": "m:o"}), "optimizer.factory is set", id="factory"),
    pytest.param(
        loop_config(evaluate="m:e", evaluateEverySteps=5, earlyStopping={"metric": "a", "mode": "Max"}),
        "trainer.earlyStopping is set",
        id="early stopping",
    ),
]
"""Configurations of which an older release would train something else, or talk in plain."""


@pytest.mark.parametrize(("config", "_"), NEWER)
def test_configuration_that_needs_this_release_is_read_by_it(config: JobConfig, _: str) -> None:
    assert JobConfig.decode(config.encode()) == (config, ())


def test_configuration_that_needs_no_newer_release_is_as_it_was() -> None:
    for config in (command_config(), served_config(consistency="Sync", backupWorkers=1)):
        assert isinstance(json.loads(config.encode())["addresses"], dict)


@pytest.mark.parametrize(("config", "says"), NEWER)
def test_trainer_of_a_release_before_refuses_its_configuration_in_one_line(config: JobConfig, says: str) -> None:
    fields: dict[str, Any] = {
        name: (Addresses if name == "addresses" else Any, ... if field.is_required() else None)
        for name, field in JobConfig.model_fields.items()
        if name != "tls"
    }
    older = create_model("Older", __base__=Model, **fields)
    refused = sentences_of_a_former_reader(older, config.encode())
    assert len(refused) == 1
    said = f"{says}, which the trainer of this image does not know: take a newer image"
    assert re.search(rf"^addresses: .*{re.escape(said)}", refused[0])
    assert sentences_of_a_former_reader(older, command_config().encode()) == ()


def sentences_of_a_former_reader(config: type[BaseModel], text: str) -> tuple[str, ...]:
    """What JobConfig.decode of 0.1.0 makes of the text: fields that it does not know are left out, values that it does not understand
    end it."""
    try:
        return sentences(read(config, json.loads(text)).unreadable)
    except NotReadable as error:
        return error.reasons


@pytest.mark.parametrize("place", [(), ("lastCheckpoint",)])
def test_report_of_a_later_master_is_read(place: tuple[str, ...]) -> None:
    report = {**REPORT, "lastCheckpoint": {"step": 40, "time": "2026-01-01T12:00:00Z"}}
    holder: Any = report
    for step in place:
        holder = holder[step]
    holder["newField"] = [1, {"a": 2}]
    progress = Progress.decode(json.dumps(report))
    assert (progress.step, progress.loss) == (41, 0.5)
    assert progress.last_checkpoint
    assert progress.last_checkpoint.step == 40


def test_value_of_a_report_that_is_not_understood_is_left_out() -> None:
    report = {
        **REPORT,
        "loss": {"mean": 0.5},
        "lastUpdateTime": "now",
        "evaluation": {"accuracy": 0.9, "matrix": [[1]]},
    }
    progress = Progress.decode(json.dumps(report))
    assert (progress.step, progress.loss, progress.last_update_time) == (41, None, None)
    assert progress.evaluation == {"accuracy": 0.9}


@pytest.mark.parametrize("wrong", [{"step": "many"}, {"step": -1}, {"step": 2**60}, {"attempt": None}, {"step": [1]}])
def test_report_that_does_not_say_its_step_and_attempt_is_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Progress.decode(json.dumps({**REPORT, **wrong}))


def test_termination_message_of_a_later_trainer_is_read() -> None:
    words = {"message": "out of memory", "where": "net.py:7", "device": "cuda:3", "progress": {**REPORT, "round": 7}}
    termination = Termination.decode(json.dumps(words))
    assert (termination.message, termination.where) == ("out of memory", "net.py:7")
    assert termination.progress
    assert termination.progress.step == 41


def test_termination_message_whose_progress_says_no_step_has_none() -> None:
    termination = Termination.decode(json.dumps({"message": "boom", "progress": {**REPORT, "step": "many"}}))
    assert (termination.message, termination.progress) == ("boom", None)


@pytest.mark.parametrize("text", ['{"error": "disk full"}', "{}", "[1]", "7", '"text"', "Killed\n", '{"message": '])
def test_termination_message_of_another_program_is_kept_as_it_is(text: str) -> None:
    assert Termination.decode(text).message == text.strip()
