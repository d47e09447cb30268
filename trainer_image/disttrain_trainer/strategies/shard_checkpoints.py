"""The checkpoints of a sharded model: every rank that owns a block writes one file, rank 0 commits them as one checkpoint.

All ranks save after the same steps. Who has written its file says so to rank 0, in a group that nothing else uses, for it is another
thread's; rank 0 publishes the manifest when it has heard from all. A round that ends meanwhile leaves files that no manifest names.
"""

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import final, store
from disttrain_trainer.checkpoint.background import BackgroundWriter, HostCopy
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.checkpoint.tensor_file import Named
from disttrain_trainer.data.schedule import DataSet
from disttrain_trainer.loop.meter import NonFinite
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.parallel.shard_state import ShardState
from disttrain_trainer.parallel.sharded_model import ShardedModel
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.strategies.kept_course import KeptCourse
from disttrain_trainer.strategies.rank import RoundEnded

log = logs.get_logger(__name__)

_SAID = 512
"""Bytes of what a rank says of its file."""
_MOST_OF_ERROR = 128
"""Characters of an error in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Writers:
    """Who writes in a round, and where they meet."""

    ranks: tuple[int, ...]
    """The first of them is rank 0."""
    group: dist.ProcessGroup | None
    """Of these ranks, for the thread that writes; None for one that is alone."""
    alive: Callable[[], bool]
    """Whether the round goes on."""


class ShardCheckpoints:
    """One rank's side. Its methods are the training thread's, but for `wait`."""

    def __init__(
        self,
        *,
        config: JobConfig,
        rank: int,
        root: Path,
        keep: int,
        metrics: Metrics,
        control: ControlClient,
        member: CollectiveMember,
        data: DataSet,
        lasting: bool,
    ) -> None:
        """root: the folder of checkpoints. keep: how many remain. lasting: the job may go on from them, and hears of each."""
        self._config = config
        self._rank = rank
        self._root = root
        self._keep = keep
        self._course = KeptCourse(root, config, control)
        self._metrics = metrics
        self._control = control
        self._member = member
        self._data = data
        self._lasting = lasting
        self._copy = HostCopy()
        self._writer = BackgroundWriter()
        self._model: ShardedModel | None = None
        self._state: ShardState | None = None
        self._writers: Writers | None = None
        self._last: Manifest | None = None
        """Rank 0's manifest of the state after the last step."""
        self.resumed: str | None = None
        """Where this attempt began, for the manifests."""
        control.before_release = self.wait

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written, for which the next one has to wait."""
        return self._writer.busy

    def begin(self, model: ShardedModel, state: ShardState, writers: Writers) -> None:
        """A round begins with these modules."""
        self._model, self._state, self._writers = model, state, writers
        self._last = None

    def end(self) -> None:
        """The round is over, and its groups are closed: waits until nothing of it is being written. What that failed with is logged alone,
        for the next round has other groups, and saves all of it again."""
        self._writer.wait()
        try:
            self._writer.check()
        except Exception as error:
            log.error("a checkpoint was not written: %s", error)

    def save(self, *, at_once: bool) -> None:
        """Saves the state after this step: in the background, or before this returns. Every rank must call it after the same step.

        Raises NonFinite when a parameter is not, and what the save before failed with.
        """
        began = time.perf_counter()
        self._writer.wait()
        self._writer.check()
        self._require_finite()
        step, asked = self._member.step, at_once and self._member.save_asked
        if at_once:
            self._member.save_asked = False
            self._commit(step, self._present(), began=began, asked=asked)
        else:
            copy = self._copy.take(self._present())
            self._writer.start(lambda: self._commit(step, copy, began=began))
        self._metrics.phase_seconds["checkpoint"] += time.perf_counter() - began

    def save_last(self) -> None:
        """Saves the state after the last step: every rank its file, rank 0 the manifest; tries again while a volume is full or broken.

        Blocks. Raises RoundEnded, Unsaved, NonFinite.
        """
        began = time.perf_counter()
        self._writer.wait()
        self._writer.check()
        self._require_finite()
        step, said = self._member.step, dict[str, str]()
        asked, self._member.save_asked = self._member.save_asked, False

        def write() -> None:
            if not said:
                said.update(self._write(step, self._present()))

        self._insist(write)
        try:
            files = _collect(said, self._round_writers, rank=self._rank) if self._writes else {}
        except BrokenGroup:
            raise RoundEnded from None
        if self._rank == 0:
            self._insist(lambda: self._publish_and_report(step, files, began=began, asked=asked))

    def finish(self) -> str | None:
        """Rank 0: the job is finished, with its evaluation and model; what is wrong when that cannot be written."""
        assert self._last is not None, "save_last comes first"
        folder = self._root / store.name_of(self._last.step)
        try:
            self._last = self._publish(folder, self._last.step, self._last.files, finished=True)
        except OSError as error:
            log.error("the end of the job was not written: %s", error)
            return str(error)
        self.answer()
        return None

    def answer(self) -> None:
        """Rank 0: tells the master, which may ask, of the last checkpoint. The other ranks have done their share, and write no more."""
        assert self._last is not None, "save_last comes first"
        asked, self._member.save_asked = self._member.save_asked, False
        self._control.send(MessageType.SAVED, step=self._last.step, time=self._last.time.isoformat(), asked=asked)

    def keep_course(self, course: Course) -> None:
        """Rank 0: keeps what an evaluation found with the checkpoint of its step, if there is one. Waits until that is written."""
        self._writer.wait()
        self._course.keep(course)

    def keep_left_out(self, course: Course) -> None:
        """Rank 0: keeps with the checkpoint that the training went back to which parts are left out after it."""
        self._course.keep_left_out(self._member.checkpoint or 0, course)

    @property
    def last_folder(self) -> Path:
        """Where the state after the last step is."""
        return self._root / store.name_of(self._member.step)

    def check(self) -> None:
        """Raises what a save in the background failed with, other than a volume that is full or broken."""
        self._writer.check()

    def wait(self) -> None:
        """Blocks until nothing is being written. Any thread's."""
        self._writer.wait()

    def _present(self) -> Named:
        assert self._state is not None
        return self._state.present()

    def _require_finite(self) -> None:
        assert self._model is not None
        self._model.verify()
        if not self._model.is_finite():
            raise NonFinite(
                f"a parameter is not finite at step {self._member.step}: lower trainer.optimizer.learningRate; "
                "no checkpoint of it is written",
                step=max(0, self._member.step - 1),
            )

    @property
    def _round_writers(self) -> Writers:
        assert self._writers is not None
        return self._writers

    @property
    def _writes(self) -> bool:
        """Whether this rank has a file; the others hold copies of what is in those of others."""
        return self._rank in self._round_writers.ranks

    def _insist(self, work: Callable[[], None]) -> None:
        """Does this work for the last checkpoint, again and again while it raises OSError. Raises RoundEnded, Unsaved."""

        def attempt() -> str | None:
            try:
                work()
            except OSError as error:
                log.error("the last checkpoint was not written: %s; it is tried again", error)
                return str(error)
            return None

        if not final.insist("last checkpoint", self._member.step, attempt, over=self._wait_for_room):
            raise RoundEnded

    def _wait_for_room(self, seconds: float) -> bool:
        """Waits so long; whether the round is over."""
        alive = self._round_writers.alive
        with self._control.changed:
            self._control.changed.wait_for(lambda: not alive(), seconds)
        self._control.check()
        return not alive()

    def _commit(self, step: int, tensors: Named, *, began: float, asked: bool = False) -> None:
        """Writes this rank's file; rank 0 then makes a checkpoint of all of them. A volume that is full or broken is logged and reported:
        the next save has all that was in this one."""
        if not self._writes:
            return
        try:
            said = self._write(step, tensors)
        except OSError as error:
            said = {"error": str(error)[:_MOST_OF_ERROR]}
        try:
            files = _collect(said, self._round_writers, rank=self._rank)
            if self._rank == 0:
                self._publish_and_report(step, files, began=began, asked=asked)
        except BrokenGroup:
            log.info("checkpoint %d is abandoned: a worker was lost while it was written", step)
            self._report_failure("a worker was lost", asked=asked)
        except OSError as error:
            log.error("checkpoint %d was not written: %s; the one before is intact", step, error)
            self._report_failure(str(error), asked=asked)

    def _write(self, step: int, tensors: Named) -> dict[str, str]:
        """Writes this rank's file, if it has one; its name and digest. Raises OSError."""
        assert self._state is not None
        if not self._writes:
            return {}
        folder = store.prepare(self._root, step)
        # A name of its own: what is there of this step already must stay whole until a manifest names the new files.
        file = f"{store.BLOCK}{self._rank}-{secrets.token_hex(4)}.safetensors"
        return {"file": file, "digest": self._state.write(folder / file, tensors)}

    def _publish_and_report(self, step: int, files: dict[str, str], *, began: float, asked: bool) -> None:
        """Rank 0: makes a checkpoint of the files of all ranks. Raises OSError."""
        folder = self._root / store.name_of(step)
        manifest = self._last = self._publish(folder, step, files, finished=False)
        self._course.prune(folder, manifest, keep=self._keep)
        if self._lasting:
            self._member.checkpoint = step
            self._metrics.checkpoint_step = step
            self._metrics.checkpoint_seconds.observe(time.perf_counter() - began)
            best = self._course.best()
            self._control.send(MessageType.SAVED, step=step, time=manifest.time.isoformat(), asked=asked, **best)

    def _report_failure(self, error: str, *, asked: bool) -> None:
        if self._rank == 0 and self._lasting:
            self._control.send(MessageType.SAVED, error=error, asked=asked)

    def _publish(self, folder: Path, step: int, files: dict[str, str], *, finished: bool) -> Manifest:
        course = self._member.course
        return store.publish(
            folder,
            config=self._config,
            step=step,
            parts=step * self._config.parts_per_step,
            data=self._data,
            files=files,
            finished=finished,
            evaluation=self._member.evaluation or (course.evaluation if course.evaluated == step else None),
            model=self._member.model,
            resumed=self.resumed,
            course=course,
        )


def _collect(said: dict[str, str], writers: Writers, *, rank: int) -> dict[str, str]:
    """On rank 0 the files of all writers with their digests, when the last one is written.

    rank: this one. Raises OSError with what a rank could not write, and BrokenGroup when the round ends before.
    """
    found = [said]
    if writers.group is not None:
        encoded = json.dumps(said).encode().ljust(_SAID)
        mine = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        every = [torch.empty(_SAID, dtype=torch.uint8) for _ in writers.ranks] if rank == 0 else None
        try:
            dist.gather(mine, every, dst=0, group=writers.group)
        except RuntimeError as error:
            raise BrokenGroup(error) from None
        except Exception as error:
            if writers.alive():
                raise
            raise BrokenGroup(error) from None  # torch no longer knows the group: the end of the round has destroyed it
        found = [json.loads(bytes(one.tolist())) for one in every or ()]
    for writer, one in zip(writers.ranks, found, strict=False):
        if "error" in one:
            raise OSError(f"worker process {writer}: {one['error']}")
    return {one["file"]: one["digest"] for one in found}
