"""What this process alone knows of a job: its `JobRecord`. It is lost with the process, and the next process finds it out again.

The record has one owner, this module: other modules read its fields, and change them by its methods.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from disttrain.api import Progress
from disttrain.controller.cache import Key
from disttrain.kube.api import Resource
from disttrain.plan.model import MadeSecret, Refusal
from disttrain.plan.progress import is_another_step, is_news

LONG_AGO = float("-inf")


class Child(NamedTuple):
    """A child of a job, which need not exist. Kinds share names: the Service and the NetworkPolicy have that of the job."""

    resource: Resource
    key: Key


@dataclass(slots=True)
class JobRecord:
    """What the API server does not keep about a job. Moments of type float are of the event loop's clock."""

    uid: str
    generation: int = 0
    """metadata.generation of the spec that `refusals` and `name_conflicts` are about."""
    refusals: dict[Child, Refusal] = field(default_factory=dict)
    """Children that the API server refused to create."""
    suspend_refused: Refusal | None = None
    """The API server refused to set spec.suspend."""
    server_errors: dict[Child, float] = field(default_factory=dict)
    """Children whose creation fails with an error of the server, and since when."""
    name_conflicts: dict[Child, float] = field(default_factory=dict)
    """Children whose name an object of another owner has, and when the operator last looked at that object."""
    former: set[Child] = field(default_factory=set)
    """Those of `name_conflicts` whose name an object of a former job of the same name has."""
    secret: tuple[str, MadeSecret] | None = None
    """What became of the last creation of a Secret, and its name."""
    waiting_for_volumes: dict[str, float] = field(default_factory=dict)
    """Uids of pods that have a node and no container yet, and since when."""
    volume_failures: dict[str, str] = field(default_factory=dict)
    """Of these pods, the message about volumes that cannot be mounted, by uid."""
    looked_at: float = LONG_AGO
    """When this process last began a pass over the job."""
    known_since: datetime | None = None
    """When this process made its first pass over the job."""
    progress: Progress | None = None
    """The newest report of the master."""
    progress_before: Progress | None = None
    """The one before it that differs from it."""
    progress_read: datetime | None = None
    step_seen: datetime | None = None
    """When the step of `progress` was first read."""
    status_written: float = LONG_AGO
    """When our last write of the status was answered; of a job without a status, when it was first seen."""
    progress_turn: float | None = None
    """When progress alone may be written; None: the job has no turn, since it has nothing to write."""
    small_writes_from: float = LONG_AGO
    """Before this moment a change that can wait is not written, so that it needs no pass."""

    def begin_pass(self, generation: int, *, has_status: bool, now: datetime, moment: float) -> None:
        """A pass over the job begins, at `now` and at `moment` of the loop's clock. A new spec may allow
        what was refused."""
        self.looked_at = moment
        if self.known_since is None:
            self.known_since = now
            if not has_status:
                self.status_written = moment
        if self.generation != generation:
            self.generation = generation
            self.name_conflicts.clear()
            self.former.clear()
            self.refusals.clear()
            self.suspend_refused = None

    def report(self, progress: Progress, now: datetime) -> bool:
        """Stores a report of the master. Returns whether it asks for a pass."""
        before, news = self.progress, is_news(progress, self.progress, self.progress_read, now)
        if is_another_step(progress, before):
            self.step_seen = now
        if progress != before:
            self.progress_before = before
        self.progress, self.progress_read = progress, now
        return news

    def refused(self, child: Child, refusal: Refusal) -> None:
        """The API server refused to create a child."""
        self.refusals[child] = refusal

    def suspension_refused(self, refusal: Refusal) -> None:
        """The API server refused to set spec.suspend."""
        self.suspend_refused = refusal

    def secret_made(self, name: str, made: MadeSecret) -> None:
        """The API server answered the creation of the Secret of that name."""
        self.secret = (name, made)

    def server_failed(self, child: Child, moment: float) -> float:
        """A creation failed with an error of the server. Returns for how many seconds each creation of this child has failed so."""
        return moment - self.server_errors.setdefault(child, moment)

    def name_taken(self, child: Child, *, former: bool, moment: float) -> None:
        """An object of another owner has the name of a child. `former`: its owner was a deleted job of this name, so it will go."""
        self.name_conflicts[child] = moment
        if former:
            self.former.add(child)
        else:
            self.former.discard(child)

    def name_checks_due(self, moment: float, seconds: float) -> list[Child]:
        """The children whose name was looked at `seconds` ago or earlier. They count as looked at now."""
        due = [child for child, looked in self.name_conflicts.items() if moment - looked >= seconds]
        self.name_conflicts |= dict.fromkeys(due, moment)
        return due

    def name_free(self, child: Child) -> None:
        """No object of another owner has the name of the child any more."""
        self.name_conflicts.pop(child, None)
        self.former.discard(child)

    def resolved(self, child: Child) -> None:
        """The child exists, or nothing prevents its creation any more."""
        self.refusals.pop(child, None)
        self.server_errors.pop(child, None)
        self.name_free(child)

    def not_created(self) -> list[Child]:
        """The children whose creation was refused or failed."""
        return [*self.refusals, *self.server_errors]

    def wait_for_volumes(self, uids: Iterable[str], moment: float) -> None:
        """These are the job's pods that have a node and no container."""
        self.waiting_for_volumes = {uid: self.waiting_for_volumes.get(uid, moment) for uid in uids}
        self.volume_failures = {
            uid: text for uid, text in self.volume_failures.items() if uid in self.waiting_for_volumes
        }

    def found_volume_failures(self, messages: dict[str, str]) -> bool:
        """Stores what Events say of volumes that cannot be mounted, by the uid of the pod; pods of other jobs may be among them. Returns
        whether that is new."""
        before = self.volume_failures
        self.volume_failures = {uid: messages[uid] for uid in self.waiting_for_volumes if uid in messages}
        return self.volume_failures != before

    def wrote_status(self, moment: float) -> None:
        """The API server answered a write of the status."""
        self.status_written = moment
        self.progress_turn = None

    def progress_waits(self, until: float | None) -> None:
        """The job has its turn to write progress alone; None: it has nothing to write."""
        self.progress_turn = until

    def small_writes_wait(self, until: float = LONG_AGO) -> None:
        """A change that can wait is not written before `until`."""
        self.small_writes_from = until


class JobRecords:
    """The JobRecord of every job; a job with the same name and another uid begins with an empty one."""

    def __init__(self) -> None:
        self._by_key: dict[Key, JobRecord] = {}

    def of(self, key: Key, uid: str) -> JobRecord:
        """The record of a job; made when there is none."""
        record = self._by_key.get(key)
        if record is None or record.uid != uid:
            record = self._by_key[key] = JobRecord(uid)
        return record

    def find(self, key: Key) -> JobRecord | None:
        return self._by_key.get(key)

    def forget(self, key: Key) -> None:
        self._by_key.pop(key, None)
