"""The history as the master writes it: what it knows, four times a second, in a thread (history_file.py)."""

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from disttrain.api.history import Header, Line
from disttrain.api.runtime import Progress
from disttrain.api.trainer import Loop
from disttrain_trainer.coordinator.history import INTERVAL_SECONDS, Look, Recorder
from disttrain_trainer.coordinator.history_file import HistoryFile, HistoryWriter
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.runtime.process import Process


class MasterHistory:
    """The history of a job whose master this process is. It lies beside the checkpoints, or in the folder of a local run; in a pod
    without a checkpoint volume in a temporary folder, and ends with the pod."""

    def __init__(self, process: Process, tracker: Tracker, progress: Callable[[], Progress]) -> None:
        self._process = process
        self._tracker = tracker
        self._progress = progress
        self._wall = time.time() - time.monotonic()
        self._recorder: Recorder | None = None
        self._writer: HistoryWriter | None = None
        self._path: Path | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def begin(self) -> None:
        """Begins to write."""
        self._writer = HistoryWriter(self._open, self._look, self._end)

    def end(self) -> None:
        """Writes the last lines."""
        if self._writer is not None:
            self._writer.end()
        if self._temporary is not None:
            self._temporary.cleanup()

    def content(self) -> bytes | None:
        """The file; None while there is none."""
        with contextlib.suppress(OSError):
            return self._path.read_bytes() if self._path is not None else None
        return None

    def _open(self) -> HistoryFile:
        config, folder = self._process.config, self._process.checkpoint_dir or self._process.model_dir
        if folder is None:
            self._temporary = self._temporary or tempfile.TemporaryDirectory(
                prefix="disttrain-history-", ignore_cleanup_errors=True
            )
            folder = Path(self._temporary.name)
        header = Header(config.name, config.namespace, config.uid, INTERVAL_SECONDS)
        file = HistoryFile(folder, header)
        self._path, self._recorder = file.path, Recorder(attempt=config.attempt, last_step=file.last_step)
        return file

    def _look(self, file: HistoryFile) -> list[Line]:
        assert self._recorder is not None, "made with the file"
        return self._recorder.look(self._now(), interval=file.interval, ranks=self._tracker.ranks.table)

    def _end(self, file: HistoryFile) -> list[Line]:
        assert self._recorder is not None, "made with the file"
        return self._recorder.end(self._now(), interval=file.interval, ranks=self._tracker.ranks.table)

    def _now(self) -> Look:
        tracker = self._tracker
        progress = self._progress()
        # The first step that a program reports is one that it has done; our own loop's reports follow its start.
        is_loop = isinstance(self._process.config.trainer.work, Loop)
        program_began_at = progress.step - 1 if progress.step and tracker.reported else None
        return Look(
            # A clock that is set back must not turn the curves back.
            time=self._wall + time.monotonic(),
            progress=progress,
            samples=tracker.samples,
            gradient_norm=tracker.newest_gradient_norm,
            phases=dict(tracker.ranks.phases),
            fell_back_to=tracker.take_fall_back(),
            began_at=tracker.began_at if is_loop else program_began_at,
        )
