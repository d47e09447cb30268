"""The snapshot in order: which pods the job needs, which exist, and what the status says about them.

Look-ups only, each computed once; every policy starts from here. Not here: any decision.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cached_property
from typing import TypeAlias

from disttrain.api.environment import ExitCode
from disttrain.api.gangs import GangScheduler
from disttrain.api.job import DistTrainJob
from disttrain.api.names import Role, pod_name
from disttrain.api.policies import BackoffLimitReset
from disttrain.api.reasons import ConditionType, Reason
from disttrain.api.runtime import Progress
from disttrain.api.spec import DistTrainJobSpec
from disttrain.api.status import DistTrainJobStatus, ReplicaStatus, Restarts
from disttrain.api.trainer import Command, Loop
from disttrain.plan import in_place
from disttrain.plan.gang_scheduler import gang_scheduler
from disttrain.plan.indexes import parse_indexes
from disttrain.plan.model import DISRUPTED, Phase, PodView, Refusal, Snapshot
from disttrain.plan.validity import unsupported

REPORT_TIMEOUT = timedelta(seconds=60)
"""Without a report for so long, it is not known whether steps are made."""

_EXITED_EARLY = (
    "the process ended before the job was done: its code or a library called exit, such as sys.exit(0) or os._exit(0)"
)
_NO_RESTARTS = Restarts()

Slot: TypeAlias = tuple[Role, int]
"""A role and an index: the place of one pod."""


@dataclass(frozen=True)
class JobView:
    """One snapshot, seen from the job's present attempt."""

    snapshot: Snapshot
    awaited: list[datetime] = field(default_factory=list, compare=False, repr=False)
    """Every moment that a policy asked for and that has not come: before the earliest of them, time alone changes no answer."""

    def reached(self, moment: datetime) -> bool:
        """Whether a moment has come. Policies compare the time by this alone, so that `decide` knows when to look again."""
        if self.now >= moment:
            return True
        self.awaited.append(moment)
        return False

    @cached_property
    def job(self) -> DistTrainJob:
        return self.snapshot.job

    @cached_property
    def spec(self) -> DistTrainJobSpec:
        return self.snapshot.job.spec

    @cached_property
    def status(self) -> DistTrainJobStatus:
        return self.snapshot.job.status

    @cached_property
    def now(self) -> datetime:
        return self.snapshot.now

    @cached_property
    def second(self) -> datetime:
        """`now` as a status keeps it. With more digits a status that was read back would differ from the one written."""
        return self.now.replace(microsecond=0)

    @cached_property
    def attempt(self) -> int:
        return self.status.attempt or 1

    @cached_property
    def started(self) -> bool:
        """Whether a pod of the job was ever made."""
        return self.status.start_time is not None

    @cached_property
    def finished(self) -> bool:
        return self.status.is_true(ConditionType.COMPLETE) or self.status.is_true(ConditionType.FAILED)

    @cached_property
    def unsupported(self) -> tuple[str, ...]:
        """What the spec asks for and this version cannot do."""
        return unsupported(self.spec)

    @cached_property
    def gang_scheduler(self) -> GangScheduler | None:
        """The one that places the job's pods together; None: each pod is placed by itself."""
        return gang_scheduler(self.snapshot)

    @cached_property
    def wish(self) -> int:
        """The workers that the spec asks for: an edit of the range of an elastic job may leave replicas outside of it."""
        worker = self.spec.worker
        return worker.replicas if worker.elastic is None else worker.elastic.within(worker.replicas)

    @cached_property
    def workers(self) -> int:
        """The workers that the job uses now. An elastic job uses fewer than it asks for where the others find no node (elastic.py)."""
        elastic, stored = self.spec.worker.elastic, self.status.worker
        if elastic is None or stored is None or stored.room is None:
            return self.wish
        return min(self.wish, elastic.within(stored.room.workers))

    @cached_property
    def replicas(self) -> dict[Role, int]:
        """How many pods of each role the job needs, in the order of their creation."""
        wanted = {Role.MASTER: 1}
        if self.spec.servers:
            wanted[Role.PARAMETER_SERVER] = self.spec.servers
        wanted[Role.WORKER] = self.workers
        return wanted

    @cached_property
    def wanted(self) -> tuple[Slot, ...]:
        """The place of every pod that the job needs: the master, the servers, the workers."""
        return tuple((role, index) for role, count in self.replicas.items() for index in range(count))

    @cached_property
    def expected(self) -> tuple[Slot, ...]:
        """The places that the job counts on: a pod that only shows whether there is a node for one more worker (elastic.py) is none."""
        elastic, stored = self.spec.worker.elastic, self.status.worker
        if elastic is None or stored is None or stored.room is None or not stored.room.probing:
            return self.wanted
        if stored.room.workers != self.workers or self.workers == elastic.min_replicas:
            return self.wanted  # the range or the number was edited meanwhile
        return tuple(slot for slot in self.wanted if slot != (Role.WORKER, self.workers - 1))

    @cached_property
    def refusals(self) -> tuple[Refusal, ...]:
        """Children that the API server refused and that the job needs. It may have fewer workers by now, as these found no room."""
        workers = self.name((Role.WORKER, 0)).rpartition("-")[0]
        names = {self.name(slot) for slot in self.wanted}
        return tuple(
            refusal
            for refusal in self.snapshot.refusals
            if refusal.name in names or refusal.name.rpartition("-")[0] != workers
        )

    @cached_property
    def present(self) -> dict[Slot, PodView]:
        """The pods of the present attempt, deleting ones included."""
        slots = set(self.wanted)
        return {
            (pod.role, pod.index): self._by_its_account(self._by_its_trainer(pod))
            for pod in self.snapshot.pods
            if pod.attempt == self.attempt and (pod.role, pod.index) in slots
        }

    def _by_its_trainer(self, pod: PodView) -> PodView:
        """A pod whose trainer has ended has ended, though a container that a webhook added to it may run on. The kubelet has a minute to
        say how the pod ended: only with its phase it says that a disruption ended the trainer."""
        if pod.phase is not Phase.RUNNING or pod.exit_code is None or pod.finished is None or pod.deleting:
            return pod
        if not self.reached(self.until(pod.finished, REPORT_TIMEOUT)):
            return pod
        return replace(pod, phase=Phase.FAILED if pod.exit_code else Phase.SUCCEEDED)

    def _by_its_account(self, pod: PodView) -> PodView:
        """A pod of ours that has ended, by what the process and the master say. The exit code says little: user code and its libraries
        can call exit(0) in the middle of the training, and an exit handler can change the code of a process that was done. A pod that was
        taken away while it ran was not done, though many a program answers SIGTERM with 0."""
        if not pod.done:
            return pod
        if pod.termination.done and not self.runs_command:
            return replace(pod, phase=Phase.SUCCEEDED)
        if pod.phase is not Phase.SUCCEEDED or self.training_done:
            return pod
        if DISRUPTED in pod.conditions:
            return replace(pod, phase=Phase.FAILED)
        if self.runs_command:
            return pod
        return replace(pod, phase=Phase.FAILED, reason=Reason.EXITED_EARLY, message=_EXITED_EARLY)

    @cached_property
    def training_done(self) -> bool:
        """Whether the master of this attempt says that all steps are done and saved."""
        termination_message = (
            pod.termination.progress
            for pod in self.snapshot.pods
            if pod.role is Role.MASTER and pod.attempt == self.attempt and pod.done
        )
        return any(report is not None and report.finished for report in (self.progress, *termination_message))

    @cached_property
    def outdated(self) -> tuple[PodView, ...]:
        """Pods of an older attempt, and those beyond the number of replicas. One of a newer attempt is not ours to judge:
        it means that the status we see is old."""
        slots = set(self.wanted)
        return tuple(
            pod
            for pod in self.snapshot.pods
            if pod.attempt < self.attempt or (pod.attempt == self.attempt and (pod.role, pod.index) not in slots)
        )

    @cached_property
    def names_taken(self) -> frozenset[str]:
        """Names of all pods that still exist; a successor has to wait for its name."""
        return frozenset(pod.name for pod in self.snapshot.pods)

    @cached_property
    def completed(self) -> frozenset[int]:
        """Workers that succeeded in this attempt, also those whose pod is gone since."""
        remembered = parse_indexes((self.status.worker and self.status.worker.completed_indexes) or "")
        seen = {
            pod.index
            for (role, _), pod in self.present.items()
            if role is Role.WORKER and pod.phase is Phase.SUCCEEDED and not pod.deleting
        }
        return remembered | seen

    @cached_property
    def failed(self) -> tuple[PodView, ...]:
        """Failed pods of this attempt. A pod that is being deleted did not fail: it was asked to end."""
        return tuple(pod for pod in self.present.values() if pod.phase is Phase.FAILED and not pod.deleting)

    @cached_property
    def declared_failed(self) -> tuple[PodView, ...]:
        """Pods that run and are written down as failed all the same, by our own judgement."""
        return tuple(
            pod
            for pod in self.present.values()
            if pod.uid in self.restarts.accounted and not pod.done and not pod.deleting
        )

    @cached_property
    def restarted_in_place(self) -> tuple[in_place.Uncounted, ...]:
        """Restarts in place that are reported and that the stored status does not count yet."""
        return in_place.uncounted(self.present.values(), self.progress, self.status.restarts or _NO_RESTARTS)

    @cached_property
    def restarts(self) -> Restarts:
        """The account, with the restarts in place that are reported by now: whatever is decided, they are written down with it."""
        stored = self.status.restarts or _NO_RESTARTS
        return in_place.counted(
            stored,
            self.restarted_in_place,
            towards_limit=0 if self._set_back(stored) else stored.counted_towards_limit,
            checkpoint_step=self.checkpoint_step,
            now=self.now,
        )

    @property
    def checkpoint_resets(self) -> bool:
        """Whether only the failures since the last checkpoint count."""
        return self.spec.run_policy.backoff_limit_reset is BackoffLimitReset.ON_CHECKPOINT

    def _set_back(self, account: Restarts) -> bool:
        return self.checkpoint_resets and self.checkpoint_step != account.checkpoint_step

    @property
    def counted_so_far(self) -> int:
        """Failures that count towards the limit; a checkpoint since the last one has set them back."""
        return 0 if self._set_back(self.restarts) else self.restarts.counted_towards_limit

    @cached_property
    def progress(self) -> Progress | None:
        """The master's report, unless it is about another attempt or too old to believe."""
        progress, read = self.snapshot.progress, self.snapshot.progress_read
        if (
            progress is None
            or progress.attempt != self.attempt
            or (read is not None and self.reached(read + REPORT_TIMEOUT))
        ):
            return None
        return progress

    def stepped_since(self, moment: datetime) -> bool:
        """Whether a step was seen after the moment, or is seen now."""
        training = self.status.training
        if training is not None and training.last_update_time is not None and training.last_update_time > moment:
            return True
        return self.steps_now

    @property
    def steps_now(self) -> bool:
        """Whether a step is seen that is not written down yet."""
        training = self.status.training
        return self.progress is not None and self.progress.step > (training.step if training is not None else 0)

    @cached_property
    def stepped(self) -> bool:
        """Whether steps of this attempt were seen. A later attempt than the first began with a resume or with a failure."""
        if self.attempt == 1:
            return self.status.training is not None and self.status.training.last_update_time is not None
        return self.attempt_began is not None and self.stepped_since(self.attempt_began)

    @property
    def attempt_began(self) -> datetime | None:
        """When this attempt began, or a pod of it was last replaced."""
        last = self.restarts.last
        begun = (self.status.start_time, last.time if last else None)
        return max((moment for moment in begun if moment is not None), default=None)

    @cached_property
    def trained(self) -> bool:
        """Whether the job ever made a step, in any attempt. Without reports of steps: whether it ever ran with all its pods."""
        training, goodput = self.status.training, self.status.goodput
        if self.steps_now or (training is not None and training.last_update_time is not None):
            return True
        progressing = self.status.condition(ConditionType.PROGRESSING)
        no_report = progressing is not None and progressing.status == "Unknown"
        if no_report and (self.runs_our_loop or self.status.is_true(ConditionType.READY)):
            return True  # the progress of our own loop is unknown only when all its pods have run
        return goodput is not None and goodput.productive_seconds + goodput.redone_seconds > 0

    @cached_property
    def whole(self) -> bool:
        """Whether every pod that the job needs now runs and is ready."""
        pods = (self.present.get(slot) for slot in self.expected if not self.needs_no_pod(slot))
        return all(pod is not None and not pod.deleting and (pod.ready or pod.phase is Phase.SUCCEEDED) for pod in pods)

    @cached_property
    def whole_since(self) -> datetime | None:
        """When the last pod became ready. Only the API server's clock is believed where a node's is ahead of ours."""
        moments = [
            pod.ready_since
            if pod.ready_since is not None and pod.created <= pod.ready_since and self.reached(pod.ready_since)
            else pod.created
            for slot in self.expected
            if (pod := self.present.get(slot)) is not None
        ]
        return max(moments, default=None)

    @cached_property
    def silent(self) -> tuple[PodView, ...]:
        """Pods that the job needs and whose node does not report."""
        return tuple(
            pod
            for slot, pod in self.present.items()
            if pod.silent_since is not None and not pod.done and not self.needs_no_pod(slot)
        )

    @cached_property
    def checkpoint_step(self) -> int:
        """Step of the newest checkpoint that any process reported, 0 for none."""
        reports = [self.progress, *(pod.termination.progress for pod in self.present.values())]
        steps = [
            report.last_checkpoint.step
            for report in reports
            if report is not None and report.last_checkpoint is not None
        ]
        if not steps and self.status.training is not None and self.status.training.last_checkpoint is not None:
            steps.append(self.status.training.last_checkpoint.step)
        return max(steps, default=0)

    @cached_property
    def runs_command(self) -> bool:
        """Whether the workers run a program of the user without our agent."""
        return isinstance(self.spec.trainer.work, Command)

    @cached_property
    def runs_our_loop(self) -> bool:
        """Whether the workers run our own loop, which reports each step."""
        return isinstance(self.spec.trainer.work, Loop)

    def name(self, slot: Slot) -> str:
        return pod_name(self.job.metadata.name, *slot)

    def has_node(self, slot: Slot) -> bool:
        """Whether the pod of that place has a node, and is not being deleted."""
        pod = self.present.get(slot)
        return pod is not None and not pod.deleting and (pod.scheduled or pod.phase is not Phase.PENDING)

    def needs_no_pod(self, slot: Slot) -> bool:
        """Whether the place needs no pod any more."""
        return slot[0] is Role.WORKER and slot[1] in self.completed

    def until(self, moment: datetime, wait: timedelta) -> datetime:
        """When a wait is over that began at a moment of a node's clock. A clock that is ahead by more than the wait itself is not
        believed, else it would decide how long a job waits."""
        return moment + wait if self.reached(moment - wait) else self.now

    def replica_status(self, role: Role) -> ReplicaStatus | None:
        """What is stored of a role, with its restarts in place that are reported by now."""
        stored = next((r for r in self.status.replica_statuses if r.role == role.status_name), None)
        more = in_place.by_role(self.restarted_in_place, role)
        if not more:
            return stored
        before = stored or ReplicaStatus(role=role.status_name)
        return before.model_copy(update={"restarts": before.restarts + more})

    def lost_its_peers(self, pod: PodView) -> bool:
        """Whether the pod says itself that it is not the root cause. A program of the user knows no such exit code, and a disruption
        explains any."""
        of_the_user = self.runs_command and pod.role is Role.WORKER
        return pod.exit_code == ExitCode.PEER_LOST and not of_the_user and DISRUPTED not in pod.conditions
