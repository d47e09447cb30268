"""The checkpoints of parameter servers, one at a time: when, and then the folder, a file of each server, a worker's buffers, the manifest.

Every step that blocks is the archive's, and answers later. A checkpoint that fails is said, and given up; the one before stays.
Pure. Not here: files (checkpoint/folder.py).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce

from disttrain.api.names import Role
from disttrain.api.runtime import ProgressCheckpoint
from disttrain_trainer.checkpoint.folder import name_of
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.data.slices import SliceSet
from disttrain_trainer.master.ledger import Ledger
from disttrain_trainer.master.member import Archive, Member, Sender
from disttrain_trainer.master.servers import Servers, slices_of
from disttrain_trainer.master.tracker import Tracker
from disttrain_trainer.messages import Message, Say

log = logging.getLogger(__name__)

HEAD_START = 10
"""The part of an interval, a tenth, by which a checkpoint begins before the steps would have to wait for it."""


@dataclass(slots=True)
class _Save:
    step: int
    final: bool
    files: dict[str, str] = field(default_factory=dict)
    applied: dict[int, SliceSet] = field(default_factory=dict)
    """What each server's file holds."""
    keeper: int | None = None
    """The worker that was asked for its buffers, and did not answer yet."""


class Saver:
    """Writes checkpoints.

    aligned: every step is saved whole, on all servers (Sync). every: steps between two checkpoints.
    keeper: the worker whose buffers are to be saved; None when the model has none, or nobody is there.
    done: called when one is complete or given up, with whether it was the final one.
    """

    def __init__(
        self,
        *,
        sender: Sender,
        servers: Servers,
        archive: Archive,
        tracker: Tracker,
        world_size: int,
        every: int,
        aligned: bool,
        keeper: Callable[[], int | None],
        done: Callable[[bool, float], None],
    ) -> None:
        self._sender = sender
        self._servers = servers
        self._keeper = keeper
        self._archive = archive
        self._tracker = tracker
        self._world_size = world_size
        self._every = every
        self._aligned = aligned
        self._done = done
        self._save: _Save | None = None
        self.newest: Manifest | None = None
        """The newest complete checkpoint."""
        self.hurrying = False
        """A process is leaving: save as soon as the steps in work are whole."""
        self._attempted = 0
        """Step of the newest one, or of a later one that failed: it is not tried again before the next is due."""

    @property
    def busy(self) -> bool:
        return self._save is not None

    def know(self, manifest: Manifest) -> None:
        """This is the newest complete checkpoint."""
        self.newest = manifest
        self._tracker.last_checkpoint = ProgressCheckpoint(step=manifest.step, time=manifest.time)

    def begin(self, ledger: Ledger) -> None:
        """The training goes on from here, which may be beyond the newest checkpoint when only the master is new."""
        self._attempted = self.newest.step if self.newest else 0
        self.raise_limit(ledger)

    def is_due(self, ledger: Ledger) -> bool:
        """Whether to start one now."""
        if self.busy or self._tracker.nan_loss:
            return False
        if self._aligned:
            return ledger.done >= ledger.limit
        return self.hurrying or ledger.step >= self._attempted + self._every - self._every // HEAD_START

    def raise_limit(self, ledger: Ledger) -> None:
        """Where the workers must wait for a checkpoint, so that a lost server never costs more than one interval.

        Sync: at the next one, since all shards must be at one version. Otherwise writing has a head start, and seldom stops anybody.
        """
        limit = self._attempted + self._every
        if self._aligned:
            limit -= limit % self._every
        ledger.limit = min(ledger.total, max(limit, self._whole(ledger)) * self._world_size)

    def hurry(self, ledger: Ledger) -> None:
        """Somebody leaves: the next one is due when the steps in work are whole."""
        self.hurrying = True
        if self._aligned:
            ledger.limit = min(ledger.limit, self._whole(ledger) * self._world_size)

    def start(self, step: int, *, final: bool = False) -> None:
        """Begins a checkpoint; one that is being written must have ended."""
        self._save = _Save(step=step, final=final)
        self._attempted = step
        self._archive.prepare(step)

    def prepared(self, step: int, folder: str | None, now: float) -> None:
        """The archive's answer to `prepare`."""
        if self._save is None or self._save.step != step:
            return
        if folder is None:
            self._end(f"the folder of step {step} cannot be made", now)
        else:
            self._servers.tell(Say.SAVE, folder=folder)
            self._ask_keeper(self._save)

    def server_saved(self, index: int, message: Message, now: float) -> None:
        """A server wrote its file, or could not."""
        save = self._save
        if save is None or message["folder"] != name_of(save.step):
            return
        if message.get("error"):
            self._end(f"parameter-server-{index}: {message['error']}", now)
            return
        save.files[f"shard-{index}.safetensors"] = message["sha256"]
        save.applied[index] = slices_of(message)
        self._complete(save)

    def worker_saved(self, rank: int, message: Message, now: float) -> None:
        """A worker wrote its buffers, or could not."""
        save = self._save
        if save is None or save.keeper != rank or message["folder"] != name_of(save.step):
            return
        if message.get("error"):
            self._end(f"worker-{rank}: {message['error']}", now)
            return
        save.files[message["file"]] = message["sha256"]
        save.keeper = None
        self._complete(save)

    def worker_left(self, rank: int) -> None:
        """A worker is lost, or begins anew: if its buffers were to be saved, somebody's are; nobody's, when nobody is there."""
        save = self._save
        if save is not None and save.keeper == rank:
            self._ask_keeper(save)
            self._complete(save)

    def published(self, manifest: Manifest | OSError, now: float) -> None:
        """The archive's answer to `publish`."""
        if isinstance(manifest, OSError):
            self._end(str(manifest), now)
        else:
            self.know(manifest)
            self._end(None, now)

    def abandon(self) -> None:
        """A server is lost: what it was to write will not come."""
        self._save = None

    def _whole(self, ledger: Ledger) -> int:
        """The step at which what is handed out already is whole."""
        return -(-ledger.handed_out // self._world_size)

    def _ask_keeper(self, save: _Save) -> None:
        save.keeper = self._keeper()
        if save.keeper is not None:
            self._sender.send(Member(Role.WORKER, save.keeper), Say.SAVE, folder=name_of(save.step))

    def _complete(self, save: _Save) -> None:
        if len(save.applied) == self._servers.count and save.keeper is None:
            slices = len(reduce(SliceSet.intersection, save.applied.values()))
            self._archive.publish(step=save.step, slices=slices, files=save.files, finished=save.final)

    def _end(self, error: str | None, now: float) -> None:
        save, self._save = self._save, None
        if error is not None:
            log.error("a checkpoint was not written: %s; the training goes on, the one before is intact", error)
        self._done(save is not None and save.final, now)
