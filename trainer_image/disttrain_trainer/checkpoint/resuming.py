"""What may differ between a checkpoint and the job that goes on from it. Pure. The table with the reasons is in docs/design/0001.

A job's configuration has three parts:

- what shapes the *state*: the tensors and files of a checkpoint fit nothing else. Must be the same.
- what numbers the *data*: the number of a step would mean other samples. Must be the same.
- all the rest, the record: may change, and status and log say what has changed.

Names, shapes and dtypes of the tensors themselves are compared as they are loaded.
"""

import json
from collections.abc import Collection, Iterable
from typing import Any

from disttrain.api.runtime import JobConfig
from disttrain.api.trainer import Trainer
from disttrain_trainer.data.schedule import DataSet, steps_per_epoch

Section = dict[str, Any]
"""Values by the names that a user knows them by, such as trainer.batchSize. None: not known."""

SAMPLES = "samples of trainer.dataset"
FINGERPRINT = "fingerprint of trainer.dataset"
STEPS = "steps of an epoch of trainer.dataset"
ORDER = "order of trainer.dataset"
LOCAL = "strategy.parameterServer.localSteps"
CUT = frozenset({"strategy.type", "strategy.parameterServer.consistency", "parameterServer.replicas"})
"""How the tensors are divided into files, and what a version of them counts: no matter where the manifest names them."""
_SHOWN = 5
"""Changes that are named one by one."""
_WIDTH = 60
"""Characters of a value that are shown."""


def state_of(config: JobConfig) -> Section:
    """What shapes the state: which files there are, and which tensors the optimiser keeps beside the parameters."""
    trainer, strategy = config.trainer.to_dict(), config.strategy.to_dict()
    optimizer = trainer.get("optimizer") or {}
    served = strategy.get("parameterServer") or {}
    section: Section = {
        "strategy.type": strategy.get("type"),
        "trainer.optimizer.name": optimizer.get("name") or ("of a factory" if optimizer else None),
        "trainer.optimizer.momentum": "set" if float(optimizer.get("momentum") or 0) else "not set",
    }
    if served:
        section |= {
            "strategy.parameterServer.consistency": served.get("consistency"),
            "parameterServer.replicas": config.parameter_servers,
        }
    steps, outer = int(served.get("localSteps") or 1), served.get("outerOptimizer") or {}
    section[LOCAL] = "1" if steps == 1 else "above 1"
    if steps > 1:  # the state beside the parameters is the outer optimiser's; that of trainer.optimizer is not saved
        section |= {
            "trainer.optimizer.name": None,
            "trainer.optimizer.momentum": None,
            "strategy.parameterServer.outerOptimizer.momentum": "set"
            if float(outer.get("momentum") or 0)
            else "not set",
        }
    return section


def data_of(config: JobConfig, data: DataSet | None) -> Section:
    """What numbers the data. data: None while the data set is not known."""
    trainer = config.trainer
    section: Section = {
        "trainer.batchSize": trainer.batch_size,
        "trainer.partsPerStep": config.parts_per_step,
        "trainer.seed": trainer.seed,
        "trainer.lastBatch": trainer.last_batch.value,
    }
    if data is not None:
        section |= {
            SAMPLES: data.samples,
            FINGERPRINT: data.fingerprint,
            ORDER: data.order,
            STEPS: steps_per_epoch(data.samples, trainer.batch_size, trainer.last_batch),
        }
    return section


def record_of(config: JobConfig) -> Section:
    """Everything that the job says of the training, flat."""
    trainer = config.trainer.model_copy(
        update={"parts_per_step": None}
    )  # it must match (`data_of`), and is not always named
    described = {"trainer": trainer.to_dict(), "strategy": config.strategy.to_dict()}
    return flat(described) | {"worker.replicas": config.workers}


COMPARED = ("trainer.earlyStopping.metric", "trainer.earlyStopping.mode")
"""Fields of a record by which one evaluation is better than another one: a best value of other ones says nothing."""


def end_of(record: Section) -> Section:
    """What a record says of an end before the last step."""
    return {
        name: value for name, value in record.items() if name.startswith(("trainer.earlyStopping", "trainer.hooks"))
    }


def flat(values: Section, *, prefix: str = "") -> Section:
    """Nested values by dotted names."""
    found: Section = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, prefix=f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def same_cut(then: Section, config: JobConfig) -> bool:
    """Whether the files of a checkpoint are those that this job itself would write; else it is read by the names of its tensors."""
    now = state_of(config)
    return all(then.get(key) == now.get(key) for key in CUT)


def misfit(then: Section, now: Section, *, free: Collection[str] = ()) -> str | None:
    """The first value that must be the same and is not, such as "trainer.batchSize: 64 then, 32 now". What is not known is no misfit.

    free: keys that are not compared.
    """
    for key in [key for key in then if key in now and key not in free]:
        old, new = then[key], now[key]
        if old is not None and new is not None and old != new:
            return f"{key}: {_short(old)} then, {_short(new)} now"
    return None


def changes(then: Section, now: Section) -> list[str]:
    """What has changed, such as 'trainer.optimizer.learningRate: 0.05 -> 0.01'. A field that `then` did not have was at its default."""
    known = {f"trainer.{field.alias}": field.default for field in Trainer.model_fields.values()} | then
    names = sorted(name for name in {*then, *now} if not (name in then and then[name] is None))
    return [
        f"{name}: {_or_none(then, name)} -> {_or_none(now, name)}"
        for name in names
        if not _equal(known.get(name), now.get(name))
    ]


def _equal(then: Any, now: Any) -> bool:
    if isinstance(then, str) and isinstance(now, int | float):  # jobs of release 0.1.0 have decimals as strings
        try:
            return float(then) == now
        except ValueError:
            return False
    return bool(then == now)


def listed(items: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    every = list(items)
    more = f", and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more


def _or_none(section: Section, name: str) -> str:
    return _short(section[name]) if name in section else "none"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"
