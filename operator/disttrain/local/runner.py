"""The loop of a local run: what is there -> `plan.decide` -> do it -> status; woken by the end of a process, or by new progress.

The same plan as on a cluster, so the same restarts, deadlines and messages. Not here: any decision (plan), what a process gets
(programs.py), what the user sees (cli/screen.py).
"""

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, Protocol

from disttrain.api.job import DistTrainJob
from disttrain.api.names import POD_GROUPS, ChildKind, Role, pod_name
from disttrain.api.reasons import FINAL, ConditionType, Reason
from disttrain.api.runtime import Progress
from disttrain.api.status import DistTrainJobStatus
from disttrain.api.trainer import Command, Loop
from disttrain.local import probes, scaling
from disttrain.local.addresses import LOCAL_NODE, LOOPBACK, Ports
from disttrain.local.folders import RunFolder
from disttrain.local.guarded import guarded
from disttrain.local.processes import Process
from disttrain.local.programs import Programs
from disttrain.manifests.environment import of_earlier_attempts
from disttrain.plan import Plan, Snapshot, decide, look_again
from disttrain.plan.model import CreatePod, DeletePod, Event, Phase, PodView, SuspendJob
from disttrain.plan.progress import is_another_step, is_news

PROGRESS_SECONDS: Final = 0.5
"""Between two looks at the master's progress."""
_INTERRUPTED: Final = "The run was interrupted"


class Observer(Protocol):
    """Who watches a run."""

    def line(self, process: Process, text: str) -> None:
        """A process printed a line."""

    def started(self, process: Process, text: str) -> None:
        """A process is started; the text says where its metrics are."""

    def changed(self, job: DistTrainJob, progress: Progress | None) -> None:
        """The status or the progress is new."""

    def event(self, event: Event) -> None:
        """What would be an Event of the job on a cluster."""


def admitted(job: DistTrainJob, folder: RunFolder) -> DistTrainJob:
    """The job of a file as an API server would have stored it: with a uid, a generation, a time, and what was before on resume."""
    now = datetime.now(UTC).replace(microsecond=0)
    job = scaling.carried_over(job, folder.path)
    metadata = job.metadata.model_copy(update={"uid": folder.uid, "generation": 1, "creation_timestamp": now})
    status = DistTrainJobStatus()
    if folder.attempt > 1:
        former = folder.former.status if folder.former is not None else status
        status = DistTrainJobStatus(
            attempt=folder.attempt,
            parts_per_step=_parts_per_step(job, folder.former),
            health=former.health,
            roll_back=former.roll_back,
        )
    return job.model_copy(update={"metadata": metadata, "status": status})


def _parts_per_step(job: DistTrainJob, former: DistTrainJob | None) -> int | None:
    """The parts of a step that a resumed run keeps; a run of an earlier version had as many as workers."""
    if not isinstance(job.spec.trainer.work, Loop) or former is None:
        return None
    if job.spec.trainer.parts_per_step is not None:  # another one than before only where no step was taken
        return job.spec.trainer.parts_per_step
    return former.status.parts_per_step or former.spec.default_parts_per_step


class Run:
    """One run of an admitted job, to its end."""

    def __init__(
        self, job: DistTrainJob, programs: Programs, folder: RunFolder, ports: Ports, observer: Observer
    ) -> None:
        self.job = job
        self.interrupted = False
        self._at_once = False
        self._began = False
        self._unwritten = False
        self._programs = programs
        self._folder = folder
        self._ports = ports
        self._observer = observer
        self._processes: dict[str, Process] = {}
        self._progress: Progress | None = None
        self._progress_before: Progress | None = None
        self._progress_read: datetime | None = None
        self._step_seen: datetime | None = None
        self._wake = asyncio.Event()
        self._tasks: asyncio.TaskGroup
        self._tell_guard: Callable[[str], None]

    @property
    def began(self) -> bool:
        """Whether a process was ever started."""
        return self._began

    async def to_its_end(self) -> DistTrainJob:
        """Runs the job; returns when it is Complete or Failed, or after `interrupt`, with no process left."""
        try:
            with guarded(self._folder.uid) as self._tell_guard:
                async with asyncio.TaskGroup() as self._tasks:
                    watching = self._tasks.create_task(self._watch_progress())
                    await self._loop()
                    watching.cancel()
        finally:
            self._folder.forget_secrets()
            self._folder.forget_copies()
        return self.job

    def interrupt(self) -> float:
        """Ends every process, and says how many seconds they have: the first time their own, the second time none. For a signal handler.

        As spec.suspend would: the plan sees to it, and the status says that no process is left.
        """
        self._at_once, self.interrupted = self.interrupted, True
        left = [process for process in self._processes.values() if process.alive]
        for process in left if self._at_once else ():
            process.stop(0)
        self._wake.set()
        return max((self._grace(process) for process in left), default=0)

    def _grace(self, process: Process) -> float:
        return 0 if self._at_once else self._programs.grace_seconds(process.role)

    async def _loop(self) -> None:
        while True:
            self._wake.clear()
            gone = [process.uid for process in self._processes.values() if process.deleting and not process.alive]
            snapshot = self._snapshot()
            plan = decide(snapshot)
            if plan.asks:
                await self._read_progress()
                snapshot = self._snapshot()
                plan = decide(snapshot)
            # A process that was deleted and has ended is gone as a pod would be: after its termination message was read.
            for uid in gone:
                del self._processes[uid]
                self._wake.set()
            self._apply(plan)
            left = [process for process in self._processes.values() if process.alive]
            if self._over():
                if not left and not gone:
                    return
                # cleanPodPolicy may leave pods for a look at them; a local run leaves their logs instead.
                for process in left:
                    process.stop(self._grace(process))
            pause = look_again(snapshot, plan)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause.total_seconds() if pause is not None else None):
                    await self._wake.wait()

    def _over(self) -> bool:
        invalid = self.job.status.condition(ConditionType.VALID)
        return self.interrupted or self.job.status.state in FINAL or (invalid is not None and invalid.status == "False")

    def _snapshot(self) -> Snapshot:
        job = self.job
        if self.interrupted:
            job = job.model_copy(update={"spec": job.spec.model_copy(update={"suspend": True})})
        return Snapshot(
            job=job,
            now=datetime.now(UTC),
            pods=tuple(self._view(process) for process in self._processes.values()),
            children=frozenset(ChildKind) - POD_GROUPS,  # processes on the loopback address need none of them
            progress=self._progress,
            progress_before=self._progress_before,
            progress_read=self._progress_read,
            step_seen=self._step_seen,
            log_hint=str(self._folder.log("{pod}")),
            keeps_certificates=True,
            local=True,
            allows_host_access=True,  # it has no pods
        )

    def _view(self, process: Process) -> PodView:
        phase = Phase.RUNNING if process.alive else Phase.FAILED if process.exit_code else Phase.SUCCEEDED
        return PodView(
            name=pod_name(self.job.metadata.name, process.role, process.index),
            uid=process.uid,
            role=process.role,
            index=process.index,
            attempt=process.attempt,
            phase=phase,
            created=process.created,
            ready=process.running,  # a pod of the job has no other readiness, either
            scheduled=True,
            deleting=process.deleting,
            finished=process.finished,
            exit_code=process.exit_code,
            reason=process.reason,
            termination=process.termination(),
            node=LOCAL_NODE,
        )

    def _apply(self, plan: Plan) -> None:
        for event in plan.events if not self.interrupted else ():
            self._observer.event(event)
        for action in plan.actions:
            match action:
                case CreatePod(role=role, index=index, attempt=attempt):
                    self._start(role, index, attempt)
                case DeletePod(uid=uid, grace_seconds=grace) if uid in self._processes:
                    process = self._processes[uid]
                    process.deleting = True
                    process.stop(self._grace(process) if grace is None else grace)
                    if not process.alive:
                        self._wake.set()
                case SuspendJob() if not self.interrupted:
                    self.interrupt()
                case _:  # a local run has no other children, and no TTL
                    pass
        status = _without_suspend(plan.status) if self.interrupted else plan.status
        if status != self.job.status:
            self.job = self.job.model_copy(update={"status": status})
            self._keep()
            if not self.interrupted:
                self._observer.changed(self.job, self._progress)

    def _keep(self) -> None:
        """Writes down how it is. A disk that is full costs what was to be written, and not the training."""
        try:
            self._folder.keep(self.job)
            self._folder.remember(self.job.status.attempt or self._folder.attempt)
            self._unwritten = False
        except OSError as error:
            if not self._unwritten:
                message = f"{self._folder.path} cannot be written: {error.strerror}; the run goes on"
                self._observer.event(Event(reason="NotWritten", message=message, warning=True))
            self._unwritten = True

    def _start(self, role: Role, index: int, attempt: int) -> None:
        uid = str(uuid.uuid4())
        name = pod_name(self.job.metadata.name, role, index)
        process = Process(
            name=name,
            uid=uid,
            role=role,
            index=index,
            attempt=attempt,
            metrics_port=self._ports.port(role, index, "metrics"),
            log=self._folder.log(name),
            termination_log=self._folder.termination_message(name, uid),
        )
        self._processes[uid] = process
        has_metrics = role is not Role.WORKER or not isinstance(self.job.spec.trainer.work, Command)
        where = f"; metrics at http://{LOOPBACK}:{process.metrics_port}/metrics" if has_metrics else ""
        self._observer.started(process, f"starts, attempt {attempt}{where}")
        self._began = True
        self._tasks.create_task(self._live(process))

    async def _live(self, process: Process) -> None:
        await process.run(
            self._programs.arguments(process),
            self._programs.environment(process) | of_earlier_attempts(self.job, process.role),
            self._observer.line,
            self._tell_guard,
        )
        if process.role is Role.WORKER and process.exit_code:
            # A job that fails is over, and its status final: what its last steps left behind is asked for before that.
            await self._read_progress()
        self._wake.set()

    async def _watch_progress(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            self._read_wish()
            await self._read_progress()

    def _read_wish(self) -> None:
        """Whether the run was asked for another number of workers, which is then what its spec asks for, as on a cluster."""
        job = self.job
        wished = scaling.wished(self._folder.path) if job.spec.worker.elastic is not None else None
        if wished is None or wished == job.spec.worker.replicas:
            return
        metadata = job.metadata.model_copy(update={"generation": (job.metadata.generation or 0) + 1})
        self.job = scaling.with_workers(job, wished).model_copy(update={"metadata": metadata})
        self._programs.resize(self.job)
        self._wake.set()

    async def _read_progress(self) -> None:
        master = next((p for p in self._processes.values() if p.role is Role.MASTER and p.running), None)
        progress = (
            await asyncio.to_thread(probes.progress, master.metrics_port, self._programs.public_key(master.attempt))
            if master
            else None
        )
        if progress is not None:
            before, now = self._progress, datetime.now(UTC)
            changed = is_news(progress, before, self._progress_read, now)
            self._progress, self._progress_read = progress, now
            if progress != before:
                self._progress_before = before
            if is_another_step(progress, before):
                self._step_seen = now
            if changed:
                self._observer.changed(self.job, progress)
                self._wake.set()


def _without_suspend(status: DistTrainJobStatus) -> DistTrainJobStatus:
    """The status of an interrupted run is that of a suspended job, but the user did not set spec.suspend."""
    reasons = (Reason.SUSPENDED, Reason.SUSPENDING)
    conditions = tuple(
        condition.model_copy(update={"message": _INTERRUPTED}) if condition.reason in reasons else condition
        for condition in status.conditions
    )
    return status.model_copy(update={"conditions": conditions})
