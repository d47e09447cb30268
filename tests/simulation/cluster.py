"""A cluster in memory that does to a job what a real one does, and worse: it lags, loses events, and the operator dies anywhere.

`Cluster` is the API server with its kubelets; `Operator` is a controller with a cache that only moves forward, as an informer's does.
Both are deterministic: what happens when is decided by the test. Not here: what must hold (test_any_order.py).
"""

import itertools
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from disttrain.api import DistTrainJob, Progress, Termination
from disttrain.api.names import ChildKind, Role, pod_name
from disttrain.api.policies import Tls
from disttrain.api.status import DistTrainJobStatus
from disttrain.plan import Plan, Snapshot, decide
from disttrain.plan.model import (
    DISRUPTED,
    Action,
    Create,
    CreatePod,
    CreateSecret,
    Delete,
    DeleteJob,
    DeletePod,
    DeleteSecret,
    Event,
    MadeSecret,
    Phase,
    PodView,
    SuspendJob,
)

START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Cluster:
    """The truth: the job as stored, and its pods."""

    body: dict[str, Any]
    now: datetime = START
    status: DistTrainJobStatus = field(default_factory=DistTrainJobStatus)
    pods: dict[str, PodView] = field(default_factory=dict)
    children: frozenset[ChildKind] = frozenset()
    secrets: dict[str, str] = field(default_factory=dict)
    """Those that exist: the uid of each, by the suffix of its name."""
    mounted: dict[int, set[str | None]] = field(default_factory=dict)
    """Of each attempt the uids of the Secrets that its pods were created with."""
    deleted: bool = False
    writes: list[DistTrainJobStatus] = field(default_factory=list)
    others_well: list[bool] = field(default_factory=list)
    """Of each write, whether every pod that had not ended was there, ready, and not asked to end, as far as the operator knew."""
    events: list[Event] = field(default_factory=list)
    own_failures: set[str] = field(default_factory=set)
    """Uids of the pods that failed without being asked to end."""
    failed_pods: dict[str, PodView] = field(default_factory=dict)
    """How they were when they failed, by uid."""
    made_after_the_end: list[str] = field(default_factory=list)
    deleted_uncounted: list[str] = field(default_factory=list)
    """Failed pods that the operator deleted before their failure was written down."""
    forced_without_need: list[str] = field(default_factory=list)
    """Pods that the operator removed by force although their node reports."""
    step: int = 0
    """What the master has reached."""
    checkpoint: int = 0
    _uids: itertools.count = field(default_factory=itertools.count)

    @property
    def job(self) -> DistTrainJob:
        return DistTrainJob.parse(self.body).model_copy(update={"status": self.status})

    @property
    def finished(self) -> bool:
        return self.status.is_true("Complete") or self.status.is_true("Failed")

    def suspend(self, value: bool) -> None:
        self.body["spec"]["suspend"] = value
        self.body["metadata"]["generation"] += 1

    # What kubelets and users do

    def run(self, name: str) -> None:
        """One phase further: scheduled, then running and ready."""
        pod = self.pods[name]
        if pod.done or pod.silent_since is not None:
            return
        self.pods[name] = (
            replace(
                pod,
                phase=Phase.RUNNING,
                ready=not pod.deleting,
                ready_since=pod.ready_since or self.now.replace(microsecond=0),
            )
            if pod.scheduled
            else replace(pod, scheduled=True, node="node-1")
        )

    def end(
        self,
        name: str,
        code: int,
        *,
        conditions: frozenset[str] = frozenset(),
        ahead: float = 0,
        all_done: bool = False,
    ) -> None:
        """The trainer container ends by itself, or because it was asked to. `ahead`: seconds of its node's clock; `all_done`: as a
        master says it."""
        pod = self.pods[name]
        if pod.done or pod.silent_since is not None:
            return
        progress = Progress(attempt=pod.attempt, step=self.step, finished=True) if all_done else None
        ended = replace(
            pod,
            phase=Phase.FAILED if code else Phase.SUCCEEDED,
            scheduled=True,
            ready=False,
            exit_code=code,
            reason="Error" if code else "",
            finished=self.now.replace(microsecond=0) + timedelta(seconds=ahead),
            termination=Termination(message=f"exit {code}" if code else "", progress=progress, done=code == 0),
            conditions=conditions,
        )
        self.pods[name] = ended
        if code and not pod.deleting:
            self.own_failures.add(pod.uid)
            self.failed_pods[pod.uid] = ended

    def delete(self, name: str) -> None:
        """A pod that has ended goes at once; a running one is asked to end and has its grace period."""
        pod = self.pods[name]
        if pod.done or not pod.scheduled:
            del self.pods[name]
        elif not pod.deleting:
            self.pods[name] = replace(
                pod, deleting=True, ready=False, deletion_deadline=self.now + timedelta(seconds=30)
            )

    def lose_node(self, name: str) -> None:
        """The pod's node stops reporting. Whether it goes on there is unknown."""
        pod = self.pods[name]
        if pod.phase is Phase.RUNNING and pod.silent_since is None:
            self.pods[name] = replace(pod, ready=False, silent_since=self.now.replace(microsecond=0))

    def node_reports_again(self, name: str) -> None:
        """What was asked to end there ends now."""
        pod = self.pods[name]
        if pod.silent_since is not None:
            self.pods[name] = replace(pod, ready=not pod.deleting, silent_since=None)

    def give_node_up(self, name: str) -> None:
        """The taint of a node that does not report deletes its pods; no kubelet confirms it."""
        if self.pods[name].silent_since is not None:
            self.pods[name] = replace(
                self.pods[name], conditions=frozenset({DISRUPTED}), disruption="DeletionByTaintManager"
            )
            self.delete(name)

    def vanish(self, name: str) -> None:
        """The end of a grace period, which only a node that reports confirms."""
        if self.pods[name].deleting and self.pods[name].silent_since is None:
            del self.pods[name]

    def train(self, steps: int, *, checkpoint: bool) -> None:
        """Steps are made only while all processes are there."""
        if self.master_runs:
            self.step += steps
            self.checkpoint = self.step if checkpoint else self.checkpoint

    @property
    def master_runs(self) -> bool:
        return any(pod.role is Role.MASTER and pod.phase is Phase.RUNNING for pod in self.pods.values())

    def report(self) -> Progress | None:
        """What the master's /progress says."""
        master = next((pod for pod in self.pods.values() if pod.role is Role.MASTER), None)
        if master is None or master.phase is not Phase.RUNNING:
            return None
        newest = {"step": self.checkpoint, "time": START} if self.checkpoint else None
        return Progress.model_validate(
            {
                "attempt": master.attempt,
                "step": self.step,
                "totalSteps": 1000,
                "lastUpdateTime": self.now if self.step else None,
                "lastCheckpoint": newest,
                "loss": 30.0 if self.step % 40 > 20 else 1.0,
            }
        )

    # What the API server answers to the operator

    def carry_out(self, action: Action, *, seen: DistTrainJob) -> MadeSecret | None:
        """seen: the job as the operator knows it. Returns what became of a Secret."""
        kept = seen.status.certificate
        match action:
            case CreateSecret():
                assert kept is not None
                self._make("the Secret", exists=kept.suffix in self.secrets)
                if kept.suffix in self.secrets:
                    return MadeSecret(uid="")
                self.secrets[kept.suffix] = f"uid-{next(self._uids)}"
                return MadeSecret(uid=self.secrets[kept.suffix], public_key="AA==")
            case DeleteSecret():
                assert kept is not None
                if kept.uid in (None, self.secrets.get(kept.suffix)):
                    self.secrets.pop(kept.suffix, None)
            case Create(kind=kind):
                self._make(f"the {kind}", exists=kind in self.children)
                self.children |= {kind}
            case Delete(kind=kind):
                self.children -= {kind}
            case CreatePod(role=role, index=index, attempt=attempt):
                name = pod_name(self.body["metadata"]["name"], role, index)
                if name in self.pods:
                    return None  # 409, and it is ours: harmless
                if seen.spec.network.tls is Tls.MUTUAL:
                    self.mounted.setdefault(attempt, set()).add(kept.uid if kept is not None else None)
                self._make(name, exists=False)
                self.pods[name] = PodView(
                    name=name,
                    uid=f"uid-{next(self._uids)}",
                    role=role,
                    index=index,
                    attempt=attempt,
                    phase=Phase.PENDING,
                    created=self.now,
                )
            case DeletePod(name=name, uid=uid, grace_seconds=0):
                if name in self.pods and self.pods[name].uid == uid:
                    if self.pods[name].silent_since is None:
                        self.forced_without_need.append(name)
                    del self.pods[name]
            case DeletePod(name=name, uid=uid):
                if name in self.pods and self.pods[name].uid == uid:
                    if not seen.spec.suspend and self._is_uncounted(self.pods[name]):
                        self.deleted_uncounted.append(name)
                    self.delete(name)
            case DeleteJob():
                self.deleted = True
            case SuspendJob():
                self.body["spec"]["suspend"] = True
        return None

    def _make(self, name: str, *, exists: bool) -> None:
        if self.finished and not exists:
            self.made_after_the_end.append(name)

    def _is_uncounted(self, pod: PodView) -> bool:
        """Whether the pod failed by itself, in the present attempt of a job that goes on, and nothing is written down of it."""
        accounted = self.status.restarts.accounted if self.status.restarts else ()
        present = pod.attempt == (self.status.attempt or 1) and not self.finished
        return present and pod.uid in self.own_failures and not pod.deleting and pod.uid not in accounted

    def write(self, status: DistTrainJobStatus) -> None:
        self.status = DistTrainJobStatus.model_validate(status.to_dict())
        self.writes.append(self.status)


@dataclass
class Operator:
    """One process of the operator. It sees its own writes, and pods as late as the test likes."""

    cluster: Cluster
    job: DistTrainJob = field(init=False)
    pods: dict[str, PodView] = field(init=False)
    report: Progress | None = None
    report_read: datetime | None = None
    listening_since: datetime = START
    children: frozenset[ChildKind] = frozenset()
    secret: tuple[str, MadeSecret] | None = None

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """A new process begins with a complete list."""
        self.report = self.report_read = None
        self.listening_since = self.cluster.now
        self.secret = None
        self.job = self.cluster.job
        self.see_all()

    def see(self, name: str) -> None:
        """One watch event. It holds the newest state: those in between are lost."""
        if name in self.cluster.pods:
            self.pods[name] = self.cluster.pods[name]
        else:
            self.pods.pop(name, None)

    def see_all(self) -> None:
        self.pods = dict(self.cluster.pods)
        self.children = self.cluster.children
        self.job = self.cluster.job

    def poll(self) -> None:
        """Reads the master's /progress; a report that cannot be read leaves the old one."""
        if (report := self.cluster.report()) is not None:
            self.report, self.report_read = report, self.cluster.now

    @property
    def snapshot(self) -> Snapshot:
        kept = self.job.status.certificate
        known = self.secret is not None and kept is not None and self.secret[0] == kept.suffix
        return Snapshot(
            job=self.job,
            now=self.cluster.now,
            pods=tuple(self.pods.values()),
            children=self.children,
            secret=self.secret[1] if known and self.secret is not None else None,
            random_suffix=f"{len(self.cluster.writes):016x}",
            progress=self.report,
            progress_read=self.report_read,
            listening_since=self.listening_since,
        )

    def reconcile(self, *, stop_after: int | None = None) -> Plan:
        """One pass. With `stop_after` it ends after so many actions, with the status unwritten: a time-out or a crash."""
        plan = decide(self.snapshot)
        for number, action in enumerate(plan.actions):
            if number == stop_after:
                return plan
            made, kept = self.cluster.carry_out(action, seen=self.job), self.job.status.certificate
            if made is not None and kept is not None:
                self.secret = (kept.suffix, made)
        if stop_after is not None:
            return plan
        current = self.cluster.job
        if self.job.metadata.generation != current.metadata.generation:
            self.job = current  # 409: the job changed under us; the next pass sees it
            return plan
        if plan.status != self.job.status:
            self.cluster.events.extend(plan.events)
            self.cluster.others_well.append(self._all_well())
            self.cluster.write(plan.status)
        self.job = self.cluster.job
        return plan

    def _all_well(self) -> bool:
        spec = self.job.spec
        wanted = 1 + (spec.parameter_server.replicas if spec.parameter_server else 0) + spec.worker.replicas
        pods = [pod for pod in self.pods.values() if pod.attempt == (self.job.status.attempt or 1)]
        return len(pods) == wanted and all((pod.done or pod.ready) and not pod.deleting for pod in pods)
