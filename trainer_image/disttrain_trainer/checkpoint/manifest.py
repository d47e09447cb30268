"""What makes a folder of files a checkpoint: the manifest, written last, with the digest of every file.

It holds what must match on resume. Not here: the files' own formats, and which checkpoint is taken (folder.py).
"""

import hashlib
import json
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from disttrain.api.runtime import JobConfig

NAME = "manifest.json"


class Manifest(BaseModel):
    """The manifest of a checkpoint."""

    # An evaluation may be infinite, such as a perplexity: pydantic would write null, and then refuse to read it.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    format: Literal[1] = 1
    job: str
    attempt: int
    step: int = Field(ge=0)
    """Steps in the state."""
    slices: int = Field(ge=0)
    """Slices applied on every shard."""
    steps_per_epoch: int = Field(ge=1)
    """How long an epoch is, from which the length of the job follows before its dataset is known again."""
    files: dict[str, str]
    """sha256 of every file, by its name in the folder."""
    seed: int
    configuration: dict[str, Any]
    """What must be the same to go on from it, so that a mismatch can be named."""
    digest: str
    """sha256 of the configuration."""
    time: datetime
    finished: bool = False
    """The job as it was then is done: nothing of it remains to be trained or evaluated."""
    evaluation: dict[str, float] | None = None

    def file_of(self, prefix: str) -> str | None:
        """The name of the file that begins so."""
        return next((name for name in self.files if name.startswith(prefix)), None)

    def for_job(self, config: JobConfig) -> "Manifest":
        """As this job is to see it: one that shall be trained for longer by now is not finished, and what was evaluated was not its end."""
        trainer = config.trainer
        total = trainer.max_steps if trainer.epochs is None else trainer.epochs * self.steps_per_epoch
        if not self.finished or total is None or self.step >= total:
            return self
        return self.model_copy(update={"finished": False, "evaluation": None})


def configuration(config: JobConfig) -> dict[str, Any]:
    """The part of a job's configuration on which the numbers of steps and slices, and the state, depend.

    epochs and maxSteps are not part of it: a job may be trained for longer than was first thought.
    """
    trainer = config.trainer.to_dict()
    for free in ("epochs", "maxSteps", "evaluate", "backend", "deterministic"):
        trainer.pop(free, None)
    return {
        "trainer": trainer,
        "strategy": config.strategy.to_dict(),
        "worldSize": config.world_size,
        "parameterServers": config.parameter_servers,
    }


def digest(configured: dict[str, Any]) -> str:
    """The digest of a configuration: the same for the same fields, in whatever order."""
    return hashlib.sha256(json.dumps(configured, sort_keys=True).encode()).hexdigest()


def difference(then: dict[str, Any], now: dict[str, Any], *, path: str = "") -> str:
    """The first field in which two configurations differ, such as "trainer.batchSize: 64 then, 32 now"."""
    for key in sorted({*then, *now}):
        old, new = then.get(key), now.get(key)
        if old != new:
            name = f"{path}{key}"
            if isinstance(old, dict) and isinstance(new, dict):
                return difference(old, new, path=f"{name}.")
            return f"{name}: {json.dumps(old)} then, {json.dumps(new)} now"
    return ""
