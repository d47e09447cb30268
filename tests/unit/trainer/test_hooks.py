"""trainer.hooks: which classes are taken, and what one with a wrong signature is told."""

import sys
from pathlib import Path

import pytest

from configs import config_of
from disttrain.api.runtime import JobConfig
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.loop.loop import StepLoss
from disttrain_trainer.model.hooks import Hooks

USERS = """
class Plain:
    def on_step(self, step, loss, metrics):
        pass

class Configured:
    def __init__(self, config):
        self.limit = config["limit"]

    def on_evaluate(self, metrics):
        return metrics["accuracy"] > self.limit

class Empty:
    pass

class TooFew:
    def on_step(self, step):
        pass

class TooMany:
    def __init__(self, one, two):
        pass

class NoMethod:
    on_step = 5
"""


@pytest.fixture(autouse=True)
def _users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hooks_of_mine.py").write_text(USERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "hooks_of_mine", raising=False)


def config(name: str) -> JobConfig:
    return config_of(
        {
            "strategy": {"type": "DataParallel"},
            "trainer": {
                "model": "m:m",
                "dataset": "m:d",
                "hooks": f"hooks_of_mine:{name}",
                "optimizer": {"name": "SGD", "learningRate": 0.1},
                "maxSteps": 10,
                "config": {"limit": 0.5},
            },
        }
    )


def test_a_class_is_made_with_the_config_where_it_takes_one() -> None:
    hooks = Hooks.of(config("Configured"))
    assert hooks is not None
    assert [hooks.evaluated({"accuracy": value}) for value in (0.4, 0.6)] == [False, True]
    assert hooks.on_step is None


def test_a_class_needs_only_the_methods_that_it_uses() -> None:
    hooks = Hooks.of(config("Plain"))
    assert hooks is not None
    assert hooks.on_step is not None
    assert not hooks.evaluated({})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Empty", "'hooks_of_mine:Empty' has none of the methods on_start, on_step, on_evaluate"),
        ("TooFew", r"on_step\(step\), but is called as on_step\(step, loss, metrics\)"),
        ("TooMany", r"is called as TooMany\(config\)"),
        ("NoMethod", "on_step is a int; expected a method"),
        ("Missing", "module hooks_of_mine has no 'Missing'"),
    ],
)
def test_a_wrong_class_is_refused_by_the_field(name: str, said: str) -> None:
    with pytest.raises(WrongInput, match=rf"trainer\.hooks: .*{said}"):
        Hooks.of(config(name))


def test_a_hook_gets_the_mean_over_the_parts_of_a_step() -> None:
    step = StepLoss()
    step.add(1.0, 3, samples=3, values={"accuracy": 0.5})
    step.add(5.0, 1, samples=1, values=None)
    assert step.take(epoch=2) == (2.0, {"epoch": 2.0, "samples": 4.0})
    assert step.take(epoch=2) == (None, {"epoch": 2.0, "samples": 0.0})
