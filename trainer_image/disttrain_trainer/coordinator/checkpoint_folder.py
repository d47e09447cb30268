"""The checkpoint folder of a job, as the master uses it: what blocks runs in a thread, its answer comes back in the event loop."""

import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import origin, store
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.coordinator.progress import Tracker
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
        evaluation, model, data = self._tracker.evaluation, self._tracker.model, self._tracker.data
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
            )
            store.prune(folder, manifest, keep=self._keep)
            return manifest

        self._try(write, answer)

    def _try(self, work: Callable[[], T], answer: Answer[T | OSError]) -> None:
        def attempt() -> T | OSError:
            try:
                return work()
            except OSError as error:
                return error

        self._run_apart(attempt, lambda result: answer(result, time.monotonic()), self._thread)
