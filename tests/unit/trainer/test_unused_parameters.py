"""trainer.findUnusedParameters: where it has no effect, the log says so."""

from typing import Any

import pytest

from configs import config_of
from disttrain_trainer.strategies.table import search_changes_nothing

SERVERS = {"strategy": {"type": "ParameterServer", "parameterServer": {"consistency": "Sync"}}}


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({"strategy": {"type": "DataParallel"}}, True),
        ({"strategy": {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}}, False),
        (SERVERS | {"parameterServer": {"replicas": 1}}, False),
        ({"strategy": {"type": "ModelParallel", "modelParallel": {"tensor": 2}}}, False),
        ({"strategy": {"type": "ModelParallel", "modelParallel": {"pipeline": 2}}}, False),
    ],
)
@pytest.mark.parametrize("searches", [False, True])
def test_a_search_without_effect_is_said(fields: dict[str, Any], changes: bool, searches: bool) -> None:
    trainer = {"model": "m:m", "dataset": "m:d", "optimizer": {"name": "SGD", "learningRate": 0.1}, "epochs": 1}
    config = config_of({"worker": {"replicas": 2}, "trainer": trainer | {"findUnusedParameters": searches}, **fields})
    said = search_changes_nothing(config)
    assert (said is not None) is (searches and not changes)
    assert said is None or said.startswith("trainer.findUnusedParameters changes nothing with this strategy")
