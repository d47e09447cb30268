"""The checkpoint folder of a job, as the master uses it: what blocks runs in a thread, its answer comes back in the event loop."""

import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from disttrain.api.runtime import JobConfig, ProgressBest
from disttrain_trainer.checkpoint import origin, retention, store
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.checkpoint.manifest import NAME, Manifest
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.net.peers import Answer
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

T = TypeVar("T")


class RunApart(Protocol):
    """Runs `work` in a thread of the executor, and then `answer` with its result in the event loop."""

    def __call__(self, work: Callable[[], T], answer: Callable[[T], None], executor: Executor) -> None: ...


class CheckpointFolder:
    """See net.peers.CheckpointStore. keep: how many checkpoints remain."""

    def __init__(self, root: Path, *, keep: int, config: JobConfig, tracker: Tracker, run_apart: RunApart) -> None:
        self._root = root
        self._keep = keep
        self._keep_best = config.checkpoint.keep_best if config.checkpoint is not None else None
        self._config = config
        self._tracker = tracker
        self._run_apart = run_apart
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        """One thread: a save that was abandoned must not publish and prune while the newest checkpoint is looked for."""

    def find(self, answer: Answer[Manifest | None]) -> None:
        def found(found: store.Found) -> None:
            if (description := found.describe(self._config)) is not None:
                log.info("%s", description)
                self._tracker.resumed = description
            answer(found.checkpoint.manifest if found.checkpoint else None, time.monotonic())

        self._run_apart(lambda: origin.look(self._root, self._config), found, self._thread)

    def prepare(self, step: int, answer: Answer[str | OSError]) -> None:
        self._try(lambda: store.prepare(self._root, step).name, answer)

    def publish(
        self, *, step: int, parts: int, files: dict[str, str], finished: bool, answer: Answer[Manifest | OSError]
    ) -> None:
        tracker, course = self._tracker, self._tracker.course
        evaluation = tracker.evaluation if tracker.evaluation_step == step else None
        model, data = tracker.model, tracker.data
        assert data is not None, "the work queue, of which something is saved, was made with it"

        def write() -> Manifest:
            folder = self._root / store.name_of(step)
            manifest = store.publish(
                folder,
                config=self._config,
                step=step,
                parts=parts,
                data=data,
                files=files,
                finished=finished,
                evaluation=evaluation,
                model=model,
                resumed=self._tracker.resumed,
                course=course,
            )
            retention.prune(
                folder,
                manifest,
                keep=self._keep,
                keep_best=self._keep_best,
                roll_back_seconds=self._config.roll_back_seconds,
            )
            return manifest

        self._try(write, answer)
        self._look_for_best()

    def amend(self, course: Course) -> None:
        def write() -> None:
            for folder in store.folders(self._root):
                if store.step_of(folder.name) >= course.evaluated and (folder / NAME).exists():
                    try:
                        store.amend(folder, course)
                    except (OSError, ValueError, WrongInput) as error:  # perhaps one that did not hold
                        log.error("%s does not get its evaluation: %s", folder.name, error)

        def answer(error: OSError | None, now: float) -> None:
            if error is not None:
                log.error("checkpoints do not get their evaluation: %s", error)

        self._try(write, answer)
        self._look_for_best()

    def _look_for_best(self) -> None:
        if (keep_best := self._keep_best) is None:
            return

        def answer(best: tuple[int, float] | OSError | None, now: float) -> None:
            if isinstance(best, tuple):
                self._tracker.best = ProgressBest(step=best[0], value=best[1])

        self._try(lambda: store.best(self._root, keep_best), answer)

    def _try(self, work: Callable[[], T], answer: Answer[T | OSError]) -> None:
        def attempt() -> T | OSError:
            try:
                return work()
            except OSError as error:
                return error

        self._run_apart(attempt, lambda result: answer(result, time.monotonic()), self._thread)
