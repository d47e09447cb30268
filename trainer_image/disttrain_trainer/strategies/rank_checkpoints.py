"""The checkpoints of a training with collectives: rank 0 writes the state of all.

One that is due in the middle of the training is written in the background. One that a process waits for (a process that drains, the end of
the job) is written at once, without a copy: the training stands still until it is committed.
"""

import secrets
import time
from pathlib import Path

from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import store
from disttrain_trainer.checkpoint.background import BackgroundWriter, HostCopy
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.checkpoint.tensor_file import Named
from disttrain_trainer.data.schedule import DataSet
from disttrain_trainer.loop.meter import NonFinite
from disttrain_trainer.model.flat import FlatModel
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.parallel.state import RankState
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.strategies.kept_course import KeptCourse

log = logs.get_logger(__name__)


class RankCheckpoints:
    """Writes the checkpoints of rank 0 and reports them to the master. Its methods are the training thread's, but for `wait`."""

    def __init__(
        self,
        *,
        config: JobConfig,
        root: Path,
        keep: int,
        metrics: Metrics,
        control: ControlClient,
        member: CollectiveMember,
        model: FlatModel,
        state: RankState,
        data: DataSet,
    ) -> None:
        """root: the folder of checkpoints. keep: how many remain."""
        self._root = root
        self._keep = keep
        self._config = config
        self._course = KeptCourse(root, config, control)
        self._metrics = metrics
        self._control = control
        self._member = member
        self._model = model
        self._state = state
        self._data = data
        self._copy = HostCopy()
        self._writer = BackgroundWriter()
        self._last: tuple[str, str] | None = None
        """The file of the state after the last step and its digest, once it is written: that state does not change any more."""
        self.resumed: str | None = None
        """Where this attempt began, for the manifests."""
        self.complete = False
        """The checkpoint of the finished job is committed."""
        control.before_release = self.wait

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written, for which the next one has to wait."""
        return self._writer.busy

    def save(self) -> None:
        """Saves the state after this step: in the background, or, when the master asked for it, before this returns.

        Raises NonFinite when a parameter is not, and what the save before failed with. A volume that is full or broken is logged
        and reported: the training goes on, and the next save has all that was in this one.
        """
        if self._member.save_asked:
            self.save_now()
            return
        began = time.perf_counter()
        self._writer.wait()
        self._require_finite()
        step, course = self._member.step, self._member.course
        tensors = self._copy.take(self._state.present())
        self._writer.start(lambda: self._commit(step, tensors, course=course, began=began))
        self._metrics.phase_seconds["checkpoint"] += time.perf_counter() - began

    def save_last(self) -> str | None:
        """Saves the state after the last step, which stays as it is; what is wrong when that fails."""
        return self.save_now(last=True)

    def answer(self) -> None:
        """The master asks for the state after the last step: saves it once more."""
        self.save_last()

    def finish(self) -> str | None:
        """Saves the state of the finished job, with its evaluation and model; what is wrong when that fails."""
        error = self.save_now(last=True, finished=True)
        self.complete = error is None
        return error

    def keep_course(self, course: Course) -> None:
        """Keeps what an evaluation found with the checkpoint of its step, if there is one. Waits until that is written."""
        self._writer.wait()
        self._course.keep(course)

    def keep_left_out(self, course: Course) -> None:
        """Keeps with the checkpoint that the training went back to which parts are left out after it."""
        self._course.keep_left_out(self._member.step, course)

    def forget_last(self) -> None:
        """A round begins: the state may change again."""
        self._last = None

    def check(self) -> None:
        """Raises what a save in the background failed with, other than a volume that is full or broken."""
        self._writer.check()

    def wait(self) -> None:
        """Blocks until nothing is being written: a process that ends in the middle would lose what it has copied. Any thread's."""
        self._writer.wait()

    def save_now(self, *, last: bool = False, finished: bool = False) -> str | None:
        """Writes the state itself; no step may be taken meanwhile."""
        began = time.perf_counter()
        self._writer.wait()
        self._writer.check()
        asked, self._member.save_asked = self._member.save_asked, False
        is_written = last and self._last is not None
        if not is_written:  # an evaluation may have changed the model since: that is no part of the training
            self._require_finite()
        step, tensors = self._member.step, {} if is_written else self._state.present()
        course = self._member.course
        error = self._commit(step, tensors, course=course, began=began, asked=asked, last=last, finished=finished)
        self._metrics.phase_seconds["checkpoint"] += time.perf_counter() - began
        return error

    def _require_finite(self) -> None:
        self._model.verify()
        if not self._model.is_finite():
            raise NonFinite(
                f"a parameter is not finite at step {self._member.step}: lower trainer.optimizer.learningRate; "
                "no checkpoint of it is written",
                step=max(0, self._member.step - 1),
            )

    def _commit(
        self,
        step: int,
        tensors: Named,
        *,
        course: Course,
        began: float,
        asked: bool = False,
        last: bool = False,
        finished: bool = False,
    ) -> str | None:
        """Writes a checkpoint; the error of a volume that is full or broken. asked: the master waits for the answer."""
        member = self._member
        try:
            folder = store.prepare(self._root, step)
            if last and self._last is not None:
                file, digest = self._last
            else:
                # A name of its own: SIGTERM may end this process in the middle, and what is there of this step already must stay whole.
                file = f"{store.STATE}{secrets.token_hex(4)}.safetensors"
                digest = self._state.write(folder / file, tensors)
            if last:
                self._last = file, digest
            manifest = store.publish(
                folder,
                config=self._config,
                step=step,
                parts=step * self._config.parts_per_step,
                data=self._data,
                files={file: digest},
                finished=finished,
                evaluation=member.evaluation or (course.evaluation if course.evaluated == step else None),
                model=member.model,
                resumed=self.resumed,
                course=course,
            )
            self._course.prune(folder, manifest, keep=self._keep)
            best = self._course.best()
        except OSError as error:
            log.error("checkpoint %d was not written: %s; the one before is intact", step, error)
            self._control.send(MessageType.SAVED, error=str(error), asked=asked)
            return str(error)
        self._metrics.checkpoint_step = step
        self._metrics.checkpoint_seconds.observe(time.perf_counter() - began)
        self._control.send(MessageType.SAVED, step=step, time=manifest.time.isoformat(), asked=asked, **best)
        return None
