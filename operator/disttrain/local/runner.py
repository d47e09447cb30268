"""The loop of a local run: what is there -> `plan.decide` -> do it -> status; woken by the end of a process, or by new progress.

The same plan as on a cluster, so the same restarts, deadlines and messages. Not here: any decision (plan), what a process is told
(programs.py), what the user sees (cli/screen.py).
"""

import asyncio
import contextlib
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final, Protocol

from disttrain.api.job import DistTrainJob
from disttrain.api.names import Role, pod_name
from disttrain.api.reasons import FINAL, ConditionType
from disttrain.api.runtime import Progress
from disttrain.api.status import DistTrainJobStatus
from disttrain.local import guard, probes
from disttrain.local.addresses import LOOPBACK, Ports
from disttrain.local.folders import RunFolder
from disttrain.local.processes import Process
from disttrain.local.programs import Programs
from disttrain.plan import Plan, Snapshot, decide
from disttrain.plan.model import CreatePod, DeletePod, Event, Phase, PodView

PROGRESS_SECONDS: Final = 0.5
"""Between two looks at the master's progress."""
INTERRUPT_GRACE_SECONDS: Final = 10.0
"""How long the processes have after Ctrl-C, enough for a checkpoint."""


class Observer(Protocol):
    """Who watches a run."""

    def line(self, process: Process, text: str) -> None:
        """A process printed a line."""

    def changed(self, job: DistTrainJob, progress: Progress | None) -> None:
        """The status or the progress is new."""

    def event(self, event: Event) -> None:
        """What would be an Event of the job on a cluster."""


def admitted(job: DistTrainJob, folder: RunFolder) -> DistTrainJob:
    """The job of a file as an API server would have stored it: with a uid, a generation, a time, and what was before on resume."""
    now = datetime.now(UTC).replace(microsecond=0)
    metadata = job.metadata.model_copy(update={"uid": folder.uid, "generation": 1, "creation_timestamp": now})
    status = DistTrainJobStatus(attempt=folder.attempt) if folder.attempt > 1 else DistTrainJobStatus()
    return job.model_copy(update={"metadata": metadata, "status": status})


class Run:
    """One run of an admitted job, to its end."""

    def __init__(
        self, job: DistTrainJob, programs: Programs, folder: RunFolder, ports: Ports, observer: Observer
    ) -> None:
        self.job = job
        self.interrupted = False
        self._programs = programs
        self._folder = folder
        self._ports = ports
        self._observer = observer
        self._processes: dict[str, Process] = {}
        self._progress: Progress | None = None
        self._progress_read: datetime | None = None
        self._wake = asyncio.Event()
        self._tasks: asyncio.TaskGroup

    async def to_its_end(self) -> DistTrainJob:
        """Runs the job; returns when it is Complete or Failed, or after `interrupt`, with no process left."""
        with _guarded(self._folder.uid):
            async with asyncio.TaskGroup() as self._tasks:
                watching = self._tasks.create_task(self._watch_progress())
                await self._loop()
                watching.cancel()
        return self.job

    def interrupt(self) -> None:
        """Ends every process: the first time with a grace period, the second time at once. For a signal handler."""
        grace = 0.0 if self.interrupted else INTERRUPT_GRACE_SECONDS
        self.interrupted = True
        for process in self._processes.values():
            process.stop(grace)
        self._wake.set()

    async def _loop(self) -> None:
        while True:
            self._wake.clear()
            if self.interrupted:
                look_again = None
            else:
                plan = decide(self._snapshot())
                self._apply(plan)
                look_again = plan.look_again
            if self._over():
                left = [process for process in self._processes.values() if process.alive]
                if not left:
                    return
                # cleanPodPolicy may leave pods for a look at them; a local run leaves their logs instead.
                for process in left:
                    process.stop_once(self._programs.grace_seconds(process.role))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    self._wake.wait(), look_again.total_seconds() if look_again is not None else None
                )

    def _over(self) -> bool:
        invalid = self.job.status.condition(ConditionType.VALID)
        return self.interrupted or self.job.status.state in FINAL or (invalid is not None and invalid.status == "False")

    def _snapshot(self) -> Snapshot:
        # What was deleted and has ended is gone, as a pod would be.
        self._processes = {uid: p for uid, p in self._processes.items() if p.alive or not p.deleting}
        return Snapshot(
            job=self.job,
            now=datetime.now(UTC),
            pods=tuple(self._view(process) for process in self._processes.values()),
            service_exists=True,  # loopback needs no Service,
            network_policy_exists=True,  # and lets nobody else in
            progress=self._progress,
            progress_read=self._progress_read,
            log_hint=str(self._folder.log("{pod}")),
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
            node="localhost",
        )

    def _apply(self, plan: Plan) -> None:
        for event in plan.events:
            self._observer.event(event)
        for action in plan.actions:
            match action:
                case CreatePod(role=role, index=index, attempt=attempt):
                    self._start(role, index, attempt)
                case DeletePod(uid=uid, grace_seconds=grace) if uid in self._processes:
                    process = self._processes[uid]
                    process.deleting = True
                    process.stop(self._programs.grace_seconds(process.role) if grace is None else grace)
                    if not process.alive:
                        self._wake.set()
                case _:  # Services, policies and the TTL of the job have no meaning here
                    pass
        if plan.status != self.job.status:
            self.job = self.job.model_copy(update={"status": plan.status})
            self._folder.keep(self.job)
            self._folder.remember(plan.status.attempt or self._folder.attempt)
            self._observer.changed(self.job, self._progress)

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
            termination_log=self._folder.last_words(name, uid),
        )
        self._processes[uid] = process
        has_metrics = role is not Role.WORKER or self.job.spec.trainer.command is None
        where = f"; metrics at http://{LOOPBACK}:{process.metrics_port}/metrics" if has_metrics else ""
        self._observer.line(process, f"starts, attempt {attempt}{where}")
        self._tasks.create_task(self._live(process))

    async def _live(self, process: Process) -> None:
        await process.run(
            self._programs.arguments(process.role), self._programs.environment(process), self._observer.line
        )
        self._wake.set()

    async def _watch_progress(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            master = next((p for p in self._processes.values() if p.role is Role.MASTER and p.running), None)
            progress = await asyncio.to_thread(probes.progress, master.metrics_port) if master else None
            if progress is not None:
                news = progress != self._progress
                self._progress, self._progress_read = progress, datetime.now(UTC)
                if news:
                    self._observer.changed(self.job, progress)
                    self._wake.set()


@contextlib.contextmanager
def _guarded(run_id: str) -> Iterator[None]:
    """Leaves nothing of the run behind: not when we end, and not when we are killed."""
    program = subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, run_id],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        program.communicate()
