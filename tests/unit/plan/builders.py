"""A job, its pods and a clock, put into words: `make_job().workers(4).running().failed(rank=2).plan()`.

`step` carries a plan out in the simplest way: what is created is Pending, what is deleted is gone. Crashes, lost events and grace
periods are the matter of tests/simulation.
"""

import copy
import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Self

from disttrain.api import DistTrainJob, Progress, Termination
from disttrain.api.names import ChildKind, Role, pod_name
from disttrain.api.status import CertificateStatus, Condition, DistTrainJobStatus
from disttrain.plan import Plan, Snapshot, decide, look_again
from disttrain.plan.model import (
    Action,
    Create,
    CreatePod,
    CreateSecret,
    Delete,
    DeletePod,
    DeleteSecret,
    MadeSecret,
    Phase,
    PodView,
    Refusal,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
MASTER, SERVER, WORKER = Role.MASTER, Role.PARAMETER_SERVER, Role.WORKER

_MODEL = {
    "model": "digits:model",
    "dataset": "digits:dataset",
    "optimizer": {"name": "SGD", "learningRate": 0.1},
    "epochs": 5,
}


def make_job(name: str = "digits") -> "Scene":
    """A data parallel job of two workers."""
    return Scene(
        {
            "metadata": {"name": name, "namespace": "team", "uid": "job-uid", "generation": 1},
            "spec": {"strategy": {"type": "DataParallel"}, "trainer": copy.deepcopy(_MODEL), "worker": {"replicas": 2}},
        }
    )


class Scene:
    """What `decide` is going to see. Every method that changes it returns it."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self.now = NOON
        self.pods: dict[str, PodView] = {}
        self.status = DistTrainJobStatus()
        self.children: frozenset[ChildKind] = frozenset()
        self.unavailable: frozenset[ChildKind] = frozenset()
        self.pod_group_phase = ""
        self.secret: MadeSecret | None = None
        self.secrets: dict[str, str] = {}
        """Those that exist: the uid of each, by the suffix of its name."""
        self.report: Progress | None = None
        self.report_before: Progress | None = None
        self.report_read: datetime | None = None
        self.step_seen: datetime | None = None
        self.listening_since: datetime | None = None
        self.refusals: tuple[Refusal, ...] = ()
        self.suspend_refused: Refusal | None = None
        self.name_conflicts: tuple[str, ...] = ()
        self.former: tuple[str, ...] = ()
        self._uids = itertools.count(1)

    # The job

    def spec(self, **fields: Any) -> Self:
        """Fields of the spec, in camelCase; objects are merged one level deep."""
        for name, value in fields.items():
            old = self.body["spec"].get(name)
            self.body["spec"][name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        return self

    def metadata(self, **fields: Any) -> Self:
        self.body["metadata"] |= fields
        return self

    def workers(self, replicas: int) -> Self:
        return self.spec(worker={"replicas": replicas})

    def servers(self, replicas: int, **strategy: Any) -> Self:
        server = {"consistency": "Sync", **strategy}
        self.body["spec"]["strategy"] = {"type": "ParameterServer", "parameterServer": server}
        return self.spec(parameterServer={"replicas": replicas})

    def command(self, *words: str) -> Self:
        self.body["spec"]["trainer"] = {"command": list(words or ("python", "-m", "mine"))}
        return self

    def script(self) -> Self:
        self.body["spec"]["trainer"] = {"script": {"file": "train.py"}}
        return self

    def run_policy(self, **fields: Any) -> Self:
        return self.spec(runPolicy=fields)

    def rules(self, *rules: dict[str, Any], default: str = "RestartReplica") -> Self:
        return self.spec(failurePolicy={"rules": list(rules), "defaultAction": default})

    @property
    def job(self) -> DistTrainJob:
        return DistTrainJob.parse(self.body).model_copy(update={"status": self.status})

    # The pods

    def pod(self, rank: int, role: Role = WORKER) -> PodView:
        return self.pods[pod_name(self.job.metadata.name, role, rank)]

    def change(self, rank: int, role: Role = WORKER, **fields: Any) -> Self:
        pod = self.pod(rank, role)
        self.pods[pod.name] = replace(pod, **fields)
        return self

    def create(self, action: CreatePod) -> Self:
        name = pod_name(self.job.metadata.name, action.role, action.index)
        assert name not in self.pods, f"{name} exists"
        self.pods[name] = PodView(
            name=name,
            uid=f"uid-{next(self._uids)}",
            role=action.role,
            index=action.index,
            attempt=action.attempt,
            phase=Phase.PENDING,
            created=self.now,
        )
        return self

    def started(self) -> Self:
        """Every pod runs, and the operator has seen it."""
        self.step()
        return self.all_run().seen()

    def training(self, step: int = 10) -> Self:
        """As `started`, and the master reports steps."""
        return self.started().reports(step).seen()

    def all_run(self) -> Self:
        for pod in list(self.pods.values()):
            if not pod.done and not pod.deleting:
                since = pod.ready_since if pod.ready else self.now
                self.pods[pod.name] = replace(
                    pod, phase=Phase.RUNNING, scheduled=True, ready=True, ready_since=since, node="node-1"
                )
        return self

    def failed(
        self, rank: int, role: Role = WORKER, *, code: int | None = 137, reason: str = "", ago: float = 0, **more: Any
    ) -> Self:
        return self.change(
            rank,
            role,
            phase=Phase.FAILED,
            ready=False,
            exit_code=code,
            reason=reason or ("OOMKilled" if code == 137 else "Error"),
            finished=self.now - timedelta(seconds=ago),
            **more,
        )

    def succeeded(self, *ranks: int, role: Role = WORKER, ago: float = 0, **more: Any) -> Self:
        """Processes of ours end with exit code 0 and say that the job is done."""
        finished = self.now - timedelta(seconds=ago)
        said = more.pop("termination", Termination()).model_copy(update={"done": True})
        for rank in ranks:
            more["termination"] = said
            self.change(rank, role, phase=Phase.SUCCEEDED, ready=False, exit_code=0, finished=finished, **more)
        return self

    def exited_early(self, *ranks: int, role: Role = WORKER) -> Self:
        """Processes end with exit code 0 and without a word, as after os._exit(0)."""
        for rank in ranks:
            self.change(rank, role, phase=Phase.SUCCEEDED, ready=False, exit_code=0, finished=self.now)
        return self

    def node_falls_silent(self, rank: int, role: Role = WORKER) -> Self:
        """The node controller has had no report of the pod's kubelet for some time, and says that the pod is not ready."""
        return self.change(rank, role, ready=False, silent_since=self.now)

    def gone(self, rank: int, role: Role = WORKER) -> Self:
        """Another client deleted the pod."""
        del self.pods[self.pod(rank, role).name]
        return self

    # The cluster

    def after(self, seconds: float) -> Self:
        self.now += timedelta(seconds=seconds)
        return self

    def reports(self, step: int, *, total: int | None = 100, **fields: Any) -> Self:
        """The master's report, read now."""
        fields = {"attempt": self.status.attempt or 1, "last_update_time": self.now, "world_size": 2, **fields}
        self.report_before = self.report
        self.report = Progress(step=step, total_steps=total, **fields)
        self.report_read = self.now
        return self

    @property
    def certificate(self) -> CertificateStatus:
        kept = self.status.certificate
        assert kept is not None
        return kept

    def new_operator(self) -> Self:
        """Another process goes on with what is stored. It has received nothing yet."""
        self.secret = None
        self.report = self.report_before = self.report_read = None
        self.listening_since = self.now
        return self

    # Passes

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot(
            job=self.job,
            now=self.now,
            pods=tuple(self.pods.values()),
            children=self.children,
            unavailable=self.unavailable,
            pod_group_phase=self.pod_group_phase,
            secret=self.secret,
            random_suffix=f"{next(self._uids):016x}",
            progress=self.report,
            progress_before=self.report_before,
            progress_read=self.report_read,
            step_seen=self.step_seen,
            listening_since=self.listening_since,
            refusals=self.refusals,
            suspend_refused=self.suspend_refused,
            name_conflicts=self.name_conflicts,
            former=self.former,
        )

    def plan(self) -> Plan:
        """What would be done now; `look_again` is that of a job whose status is written at once."""
        snapshot = self.snapshot
        plan = decide(snapshot)
        return replace(plan, look_again=look_again(snapshot, plan))

    def step(self) -> Plan:
        """What is done now: the actions carried out and the status kept, as an API server gives it back."""
        plan = self.plan()
        for action in plan.actions:
            self.carry_out(action)
        self.status = read_back(plan.status)
        return plan

    def step_through_deletion(self, rank: int, role: Role = WORKER) -> Self:
        """Passes until the operator deletes the pod, which stays: its node does not answer."""
        pod = self.pod(rank, role)
        while pod.name in self.pods:
            self.step()
        self.pods[pod.name] = replace(pod, deleting=True, deletion_deadline=self.now + timedelta(seconds=30))
        return self

    def seen(self, passes: int = 4) -> Self:
        """Passes at one moment, until nothing is left to do."""
        for _ in range(passes):
            before = self.status
            if not self.step().actions and self.status == before:
                return self
        return self

    def carry_out(self, action: Action) -> None:
        match action:
            case Create(kind=kind):
                self.children |= {kind}
            case Delete(kind=kind):
                self.children -= {kind}
            case CreateSecret():
                suffix = self.certificate.suffix
                self.secret = MadeSecret(
                    uid="" if suffix in self.secrets else f"secret-{next(self._uids)}", public_key="AA=="
                )
                self.secrets.setdefault(suffix, self.secret.uid)
            case DeleteSecret():
                self.secrets.pop(self.certificate.suffix, None)
                self.secret = None
            case CreatePod():
                self.create(action)
            case DeletePod(name=name, uid=uid):
                if name in self.pods and self.pods[name].uid == uid:
                    del self.pods[name]

    # Shorthand for assertions

    @property
    def finished(self) -> bool:
        return self.status.completion_time is not None

    def condition(self, type_: str) -> Condition:
        condition = self.status.condition(type_)
        assert condition is not None, f"no condition {type_}"
        return condition

    def says(self, type_: str) -> tuple[str, str]:
        """Status and reason of a condition."""
        condition = self.condition(type_)
        return condition.status, condition.reason


def read_back(status: DistTrainJobStatus) -> DistTrainJobStatus:
    """The status after a round trip through JSON."""
    return DistTrainJobStatus.model_validate(status.to_dict())


def created(plan: Plan) -> list[tuple[Role, int]]:
    return [(action.role, action.index) for action in plan.actions if isinstance(action, CreatePod)]


def deleted(plan: Plan) -> list[str]:
    return [action.name for action in plan.actions if isinstance(action, DeletePod)]


def words(message: str, where: str = "") -> Termination:
    return Termination(message=message, where=where)
