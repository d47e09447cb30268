"""The checkpoints of a sharded model: every rank that owns a block writes one file, rank 0 commits them as one checkpoint.

All ranks save after the same steps, so that they number their saves alike. Who has written its file says so in the round's store; rank 0
waits there, and publishes the manifest when the last one has. A round that ends meanwhile leaves files that no manifest names.
"""

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import Store  # type: ignore[attr-defined]  # not in its __all__

from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import final, store
from disttrain_trainer.checkpoint.background import BackgroundWriter, HostCopy
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.checkpoint.tensor_file import Named
from disttrain_trainer.data.schedule import DataSet
from disttrain_trainer.errors import UserError
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.parallel.shard_state import ShardState
from disttrain_trainer.parallel.sharded_model import ShardedModel
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.strategies.rank import RoundEnded

log = logs.get_logger(__name__)

_LOOK_SECONDS = 0.01
"""Seconds between two looks at whether every rank has written its file."""


class Abandoned(Exception):
    """The round ended before every rank had written its file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Writers:
    """Who writes in a round, and where they meet."""

    ranks: tuple[int, ...]
    store: Store | None
    """None for a rank that is alone."""
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
        self._number = 0
        """Of the next save of this round."""
        self._last: Manifest | None = None
        """Rank 0's manifest of the state after the last step."""
        self.resumed: str | None = None
        """Where this attempt began, for the manifests."""
        control.before_release = self.wait

    def begin(self, model: ShardedModel, state: ShardState, writers: Writers) -> None:
        """A round begins with these modules."""
        self._writer.wait()
        self._model, self._state, self._writers = model, state, writers
        self._number, self._last = 0, None

    def save(self, *, at_once: bool) -> None:
        """Saves the state after this step: in the background, or before this returns. Every rank must call it after the same step.

        Raises UserError when a parameter is not finite, and what the save before failed with.
        """
        began = time.perf_counter()
        self._writer.wait()
        self._writer.check()
        self._require_finite()
        step, number, asked = self._member.step, self._next(), at_once and self._member.save_asked
        if self._writers is None or self._rank not in self._writers.ranks:
            return
        if at_once:
            self._member.save_asked = False
            self._commit(step, number, self._present(), began=began, asked=asked)
        else:
            copy = self._copy.take(self._present())
            self._writer.start(lambda: self._commit(step, number, copy, began=began))
        self._metrics.phase_seconds["checkpoint"] += time.perf_counter() - began

    def save_last(self) -> None:
        """Saves the state after the last step: every rank its file, rank 0 the manifest. Blocks. Raises RoundEnded, Unsaved, UserError."""
        began = time.perf_counter()
        self._writer.wait()
        self._writer.check()
        self._require_finite()
        step, number = self._member.step, self._next()
        asked, self._member.save_asked = self._member.save_asked, False

        def attempt() -> str | None:
            return self._commit(step, number, self._present(), began=began, asked=asked, insists=True)

        if not final.insist("last checkpoint", step, attempt, over=self._wait_for_room):
            raise RoundEnded

    def finish(self) -> str | None:
        """Rank 0: the job is finished, with its evaluation and model; what is wrong when that cannot be written."""
        assert self._last is not None, "save_last comes first"
        folder = self._root / store.name_of(self._last.step)
        try:
            self._last = self._publish(folder, self._last.step, self._last.files, finished=True)
        except OSError as error:
            log.error("the end of the job was not written: %s", error)
            return str(error)
        asked, self._member.save_asked = self._member.save_asked, False
        self._control.send(MessageType.SAVED, step=self._last.step, time=self._last.time.isoformat(), asked=asked)
        return None

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

    def _next(self) -> int:
        number, self._number = self._number, self._number + 1
        return number

    def _present(self) -> Named:
        assert self._state is not None
        return self._state.present()

    def _require_finite(self) -> None:
        assert self._model is not None
        self._model.verify()
        if not self._model.is_finite():
            raise UserError(
                f"a parameter is not finite at step {self._member.step}: lower trainer.optimizer.learningRate; "
                "no checkpoint of it is written"
            )

    def _wait_for_room(self, seconds: float) -> bool:
        """Waits so long; whether the round is over."""
        assert self._writers is not None
        alive = self._writers.alive
        with self._control.changed:
            self._control.changed.wait_for(lambda: not alive(), seconds)
        self._control.check()
        return not alive()

    def _commit(
        self, step: int, number: int, tensors: Named, *, began: float, asked: bool = False, insists: bool = False
    ) -> str | None:
        """Writes this rank's file; rank 0 then makes a checkpoint of all of them. What is wrong when a volume is full or broken.

        insists: this rank tries again, so that the others need not hear of its failure.
        """
        assert self._state is not None
        assert self._writers is not None
        writers, failure, said = self._writers, None, {}
        folder = self._root / store.name_of(step)
        if self._rank in writers.ranks:
            try:
                folder = store.prepare(self._root, step)
                # A name of its own: what is there of this step already must stay whole until a manifest names the new files.
                file = f"{store.BLOCK}{self._rank}-{secrets.token_hex(4)}.safetensors"
                said = {"file": file, "sha256": self._state.write(folder / file, tensors)}
            except OSError as error:
                if insists:
                    log.error("checkpoint %d was not written: %s; it is tried again", step, error)
                    return str(error)
                said = {"error": str(error)}
            if writers.store is not None and self._rank:
                writers.store.set(_key(number, self._rank), json.dumps(said))
        if self._rank:
            return None
        try:
            files = self._collect(number, writers, own=said)
            manifest = self._publish(folder, step, files, finished=False)
            store.prune(folder, manifest, keep=self._keep)
        except Abandoned:
            if insists:
                raise RoundEnded from None
            log.info("checkpoint %d is abandoned: a worker was lost while it was written", step)
            self._control.send(MessageType.SAVED, error="a worker was lost", asked=asked)
            return None
        except OSError as error:
            failure = str(error)
            log.error("checkpoint %d was not written: %s; the one before is intact", step, failure)
            self._control.send(MessageType.SAVED, error=failure, asked=asked)
            return failure
        self._last = manifest
        if not self._lasting:
            return None
        self._member.checkpoint = step
        self._metrics.checkpoint_step = step
        self._metrics.checkpoint_seconds.observe(time.perf_counter() - began)
        self._control.send(MessageType.SAVED, step=step, time=manifest.time.isoformat(), asked=asked)
        return None

    def _collect(self, number: int, writers: Writers, *, own: dict[str, str]) -> dict[str, str]:
        """The files of all writers with their digests. Raises Abandoned, and OSError with what a rank could not write."""
        said = {0: own}
        others = [rank for rank in writers.ranks if rank]
        if writers.store is not None and others:
            keys = [_key(number, rank) for rank in others]
            try:
                while not writers.store.check(keys):
                    if not writers.alive():
                        raise Abandoned
                    time.sleep(_LOOK_SECONDS)
                said |= {rank: json.loads(writers.store.get(key)) for rank, key in zip(others, keys, strict=True)}
            except RuntimeError as error:  # the master, which has the store, is lost
                raise Abandoned from error
        for rank, found in said.items():
            if "error" in found:
                raise OSError(f"worker process {rank}: {found['error']}")
        return {found["file"]: found["sha256"] for found in said.values()}

    def _publish(self, folder: Path, step: int, files: dict[str, str], *, finished: bool) -> Manifest:
        return store.publish(
            folder,
            config=self._config,
            step=step,
            parts=step * self._config.parts_per_step,
            data=self._data,
            files=files,
            finished=finished,
            evaluation=self._member.evaluation,
            model=self._member.model,
            resumed=self.resumed,
        )


def _key(number: int, rank: int) -> str:
    return f"saved/{number}/{rank}"
