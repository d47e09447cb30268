"""What runs and how it exchanges, as one type each: trainer.work and strategy.exchange."""

import pytest

from disttrain.api.strategy import DataParallel, ModelParallel, ParameterServerStrategy, Sharding, Strategy
from disttrain.api.trainer import Command, Loop, Script, Trainer

OUR_LOOP = {"model": "a:m", "dataset": "a:d", "epochs": 1, "optimizer": {"name": "SGD", "learningRate": 1}}


def test_the_work_of_our_loop_has_what_the_loop_cannot_do_without() -> None:
    trainer = Trainer.model_validate(OUR_LOOP | {"loss": "a:l"})
    assert trainer.work == trainer.loop
    match trainer.work:
        case Loop(model="a:m", dataset="a:d", loss="a:l", evaluate=None, collate=None, optimizer=optimizer):
            assert optimizer == trainer.optimizer
        case other:
            pytest.fail(f"{other} is the work of a loop")


def test_the_work_of_a_script_is_its_file_and_arguments() -> None:
    assert Trainer.model_validate({"script": {"file": "a.py", "args": ["-v"]}}).work == Script(
        file="a.py", args=("-v",)
    )


def test_the_work_of_a_command_is_its_words() -> None:
    assert Trainer(command=("python", "-V")).work == Command(("python", "-V"))


def test_the_work_follows_a_copy_that_changes_a_field() -> None:
    trainer = Trainer.model_validate(OUR_LOOP)
    assert trainer.loop.model == "a:m"
    assert trainer.model_copy(update={"model": "b:m"}).loop.model == "b:m"


def test_a_script_or_command_has_no_loop() -> None:
    with pytest.raises(TypeError, match="this job runs a Command, not our loop"):
        _ = Trainer(command=("true",)).loop


@pytest.mark.parametrize(
    ("strategy", "exchange"),
    [
        ({"type": "DataParallel"}, DataParallel()),
        (
            {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}},
            DataParallel(sharding=Sharding.FULLY_SHARD),
        ),
        ({"type": "ModelParallel", "modelParallel": {"pipeline": 2}}, ModelParallel(pipeline=2)),
        (
            {"type": "Hybrid", "modelParallel": {"tensor": 2}, "dataParallel": {"sharding": "FullyShard"}},
            ModelParallel(tensor=2),
        ),
    ],
)
def test_processes_that_exchange_without_servers_are_synchronous(
    strategy: dict[str, object], exchange: DataParallel | ModelParallel
) -> None:
    found = Strategy.model_validate(strategy)
    assert found.exchange == exchange
    assert found.synchronous


@pytest.mark.parametrize(
    ("served", "synchronous"),
    [
        ({"consistency": "Sync"}, True),
        ({"consistency": "Async"}, False),
        ({"consistency": "BoundedStaleness", "maxStaleness": 2}, False),
    ],
)
def test_servers_are_synchronous_by_their_consistency(served: dict[str, object], synchronous: bool) -> None:
    strategy = Strategy.model_validate({"type": "ParameterServer", "parameterServer": served})
    assert strategy.exchange == ParameterServerStrategy.model_validate(served)
    assert strategy.synchronous is synchronous
