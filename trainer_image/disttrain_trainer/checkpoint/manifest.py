"""What makes a folder of files a checkpoint: the manifest, written last, with the digest of every file and its own.

It holds what must match on resume, and what the job was otherwise.
"""

from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from disttrain.api import digested
from disttrain.api.runtime import JobConfig, ProgressModel
from disttrain.api.tensor_index import Entry
from disttrain_trainer.checkpoint import resuming
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.checkpoint.resuming import Section
from disttrain_trainer.data.order import TABLE

NAME = "manifest.json"
FORMAT = 3
"""2: every digest is a sha256."""
_READ = (2, FORMAT)


class OtherFormat(Exception):
    """Only another version of the trainer can read the manifest."""


class Manifest(BaseModel):
    """The manifest of a checkpoint."""

    # An evaluation may be infinite, such as a perplexity: pydantic would write null, and then refuse to read it.
    model_config = ConfigDict(extra="ignore", frozen=True, ser_json_inf_nan="constants", populate_by_name=True)

    format: Literal[2, 3] = 3
    job: str
    namespace: str | None = None
    """Of the job; None in manifests of older releases."""
    attempt: int
    step: int = Field(ge=0)
    """Steps in the state."""
    parts: int = Field(ge=0, alias="slices")
    """Batch parts that every shard has applied. The file names them parts."""
    parts_per_step: int = Field(ge=1, alias="slices_per_step")
    """Parts of a step, by which the parts are numbered."""
    steps_per_epoch: int = Field(ge=1)
    """How long an epoch is, from which the length of the job follows before its dataset is known again."""
    files: dict[str, str]
    """Digest of every file, by its name in the folder."""
    state: Section
    """What shapes the state: must be the same to go on from it."""
    data: Section
    """What numbers the data: the same."""
    record: Section = {}
    """The job as it was, flat, to say what has changed. None: not known."""
    resumed: str | None = None
    """What was said of the start of the attempt that wrote it, for a new master of that attempt."""
    time: datetime
    finished: bool = False
    """The job as it was then is done: nothing of it remains to be trained or evaluated."""
    evaluation: dict[str, float] | None = None
    """Of this step."""
    course: Course = Course()
    """That of the training up to this step."""
    model: ProgressModel | None = None
    """The file of the trained model, once it is written."""
    taken: str | None = None
    """Of a checkpoint that was taken over from another job: the name of the folder it was kept in first (origin.py)."""
    tensors: dict[str, Entry] = {}
    """Where each tensor of the model lies in the files, by the names of state_dict(), with what the optimiser keeps beside it."""

    @classmethod
    def read(cls, text: str) -> "Manifest":
        """The manifest of a file's text. Raises ValueError when it is damaged, or OtherFormat."""
        raw = digested.verified(text)
        number = raw.get("format")
        if isinstance(number, int) and number not in _READ:
            version = "a later" if number > FORMAT else "an earlier"
            raise OtherFormat(
                f"{version} version of the trainer: its format is {number}, and this version reads {_READ[0]} and {FORMAT}"
            )
        manifest = cls.model_validate(raw)
        manifest.data.setdefault(resuming.ORDER, TABLE)
        manifest.state.setdefault(resuming.LOCAL, "1")
        return manifest

    @classmethod
    def digest_beside(cls, file: Path) -> str | None:
        """The digest of a file as the manifest in its folder says; None when there is no manifest, or it does not name the file."""
        try:
            return cls.read((file.parent / NAME).read_text()).files.get(file.name)
        except (OSError, ValueError, OtherFormat):
            return None

    def text(self) -> str:
        """What `read` reads."""
        return digested.with_digest(self.model_dump_json(by_alias=True))

    def file_of(self, prefix: str) -> str | None:
        """The name of the file that begins with this prefix; None when there is none."""
        return next((name for name in self.files if name.startswith(prefix)), None)

    def for_job(self, config: JobConfig) -> "Manifest":
        """As this job is to see it: one that is to be trained for longer, or no longer ends early, is not finished, and its evaluation and
        model are not those of the end."""
        trainer, course = config.trainer, self.course
        total = trainer.max_steps if trainer.epochs is None else trainer.epochs * self.steps_per_epoch
        then, now = (resuming.end_of(record) for record in (self.record, resuming.record_of(config)))
        if any(then.get(name) != now.get(name) for name in resuming.COMPARED):
            course = course.model_copy(update={"record": None, "waited": 0})
        if course.stopped is not None:
            if then == now:
                return self
            course = course.model_copy(update={"stopped": None, "waited": 0})
        elif not self.finished or total is None or self.step >= total:
            return self.model_copy(update={"course": course})
        return self.model_copy(update={"finished": False, "evaluation": None, "model": None, "course": course})
