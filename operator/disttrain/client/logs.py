"""The logs of a job's pods as one: those that are there, or from now on to the job's end, whatever is restarted, replaced or late.

A kubelet sends the log of one container, to its end. So each pod has a reader that asks again from the last second that it saw, until
the container has ended for good. Not here: the order of the lines, and which are shown already (disttrain.logs).
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final

from disttrain.api.job import DistTrainJob
from disttrain.api.names import LABEL_INDEX, LABEL_JOB_NAME, LABEL_ROLE, TRAINER_CONTAINER, Role
from disttrain.client.errors import of_answer
from disttrain.client.jobs import Jobs, owns
from disttrain.client.watching import AGAIN_SECONDS, Api, current, to_its_end
from disttrain.kube.api import PODS, ApiError, Body, NotFound, Unavailable
from disttrain.kube.client import whole_lines
from disttrain.logs import ALL, LogLine, Selection, Shown, TimeOrder, last_state, stamped

PATIENCE_SECONDS: Final = 0.5
"""How long a line waits for earlier ones of other pods. More than the time that a line takes through kubelet and API server."""
_MOST_WAITING: Final = 2000
"""Lines of one pod that wait for their turn: while there are so many, no more are read."""
_QUIET_SECONDS: Final = 5.0
"""A pod that outlives its job, as with cleanPodPolicy None, and says nothing for so long is not read any more."""
_NOT_A_LINE: Final = (b"unable to retrieve container logs", b"failed to try resolving symlinks")
"""What a kubelet says where a container's log is gone."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is shown of a job's logs."""

    selection: Selection = ALL
    since: str = ""
    """RFC 3339, whole seconds; "": from the beginning. Of pods that are there at the start; all of later ones is shown."""
    tail: int | None = None
    """The last lines of each of these pods; None: all."""
    previous: bool = False
    """Of the container that ran before in the pod, where there was one."""


async def of_job(
    jobs: Jobs, api: Api, job: Body, wanted: Wanted, *, follow: bool = False, clock: Callable[[], float] | None = None
) -> AsyncGenerator[list[LogLine], None]:
    """The lines of a job's pods in the order of time, some at once. follow: to the end of the job. Raises ClusterError.

    Close it (contextlib.aclosing) where it is left before its end.
    """
    reading = _Reading(jobs, api, job, wanted, follow=follow, clock=clock or asyncio.get_running_loop().time)
    try:
        async for lines in reading.lines():
            yield lines
    finally:
        await reading.stop()


class _Reading:
    """The readers of the pods, and what they have read."""

    def __init__(
        self, jobs: Jobs, api: Api, job: Body, wanted: Wanted, *, follow: bool, clock: Callable[[], float]
    ) -> None:
        self._jobs, self._api, self._job, self._wanted = jobs, api, job, wanted
        self._follow, self._clock = follow, clock
        self._processes = processes_per_worker(job)
        self._order = TimeOrder(PATIENCE_SECONDS if follow else float("inf"))
        self._pods: Mapping[str, Body] = {}
        self._changed = asyncio.Event()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._readers: dict[str, asyncio.Task[None]] = {}
        """By the uid of their pods."""
        self._watchers: list[asyncio.Task[None]] = []
        self._count: Counter[str] = Counter()
        """Lines that came of each."""
        self._error: Exception | None = None
        self._over = False

    async def lines(self) -> AsyncGenerator[list[LogLine], None]:
        """All of them, to the end."""
        self._begin(await self._jobs.pods(self._job), late=False)
        if self._follow:
            self._watchers = [self._task(self._watch_pods()), self._task(self._watch_job())]
        while True:
            self._wake.clear()
            taken = self._order.take(self._clock())
            self._room.set()
            if taken:
                yield taken
            if self._error is not None:
                raise self._error
            if all(reader.done() for reader in self._readers.values()) and (self._over or not self._follow):
                if not (taken := self._order.take(float("inf"))):
                    return
                yield taken
            due = self._order.due()
            wait = None if due is None or not self._follow else max(0.0, due - self._clock())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(
                    wait
                ):  # asyncio.wait_for of Python 3.11 may drop the cancellation that Ctrl-C is
                    await self._wake.wait()

    async def stop(self) -> None:
        """Ends every request."""
        tasks = [*self._watchers, *self._readers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        async def noted() -> None:
            try:
                await work
            except Exception as error:  # handed on to the reader of the lines, where it is raised
                self._error = error
            finally:
                self._wake.set()

        return asyncio.get_running_loop().create_task(noted())

    def _begin(self, pods: list[Body], *, late: bool) -> None:
        """Readers for the pods that have none yet."""
        self._pods = {str(pod["metadata"]["uid"]): pod for pod in pods}
        self._changed.set()
        self._changed = asyncio.Event()
        for uid, pod in self._pods.items():
            if uid in self._readers or (place := _place(pod)) is None:
                continue
            if self._wanted.selection.takes(*place, self._processes):
                self._order.open(uid)
                self._readers[uid] = self._task(self._read_pod(uid, *place, late=late))

    async def _watch_pods(self) -> None:
        selector = f"{LABEL_JOB_NAME}={self._job['metadata']['name']}"
        async for pods in current(self._api, PODS, self._jobs.namespace, what="list the pods", selector=selector):
            self._begin([pod for pod in pods.values() if owns(self._job, pod)], late=True)

    async def _watch_job(self) -> None:
        async for _ in to_its_end(self._api, self._job):
            pass
        # A finished job gets no more pods; those that the other watch has not brought yet are asked for.
        self._begin(await self._jobs.pods(self._job), late=True)
        self._over = True
        self._wake.set()
        await self._let_them_end()

    async def _let_them_end(self) -> None:
        """What outlives its job is not waited for, but what is being deleted is."""
        while True:
            before = self._count.copy()
            await asyncio.sleep(_QUIET_SECONDS)
            for uid, reader in self._readers.items():
                pod = self._pods.get(uid)
                lives = pod is not None and "deletionTimestamp" not in pod["metadata"] and not _has_ended(pod)
                if lives and self._count[uid] == before[uid]:
                    reader.cancel()

    async def _read_pod(self, uid: str, role: Role, index: int, *, late: bool) -> None:
        try:
            await self._read_to_its_end(uid, role, index, late=late)
        finally:
            self._order.close(uid)

    async def _read_to_its_end(self, uid: str, role: Role, index: int, *, late: bool) -> None:
        first = _First(self._wanted, late=late)
        shown, instance = Shown(), None
        while (pod := await self._started(uid)) is not None:
            status = _trainer(pod)
            ended, restarts = _has_ended(pod), int(status.get("restartCount", 0))
            if instance is not None and restarts > instance:
                await self._read(uid, role, index, shown, first, previous=True)
                shown = Shown()
            instance = restarts
            changed = self._changed
            live = self._follow and not ended
            before = self._count[uid]
            whole = await self._read(uid, role, index, shown, first, previous=self._wanted.previous, follow=live)
            # A stream may be cut off at any time, and look as if it had ended: the log of a container that has ended is read until
            # that brings nothing more.
            if not self._follow or self._wanted.previous or (ended and whole and self._count[uid] == before):
                return
            if ended:
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(AGAIN_SECONDS):
                    await changed.wait()

    async def _started(self, uid: str) -> Body | None:
        """The pod, once its container has run; None when it is gone, or where the log is not followed."""
        while (pod := self._pods.get(uid)) is not None:
            status = _trainer(pod)
            state = status.get("state", {})
            if "running" in state or "terminated" in state or status.get("restartCount"):
                return pod
            if not self._follow or _has_ended(pod):
                return None
            await self._changed.wait()
        return None

    async def _read(
        self, uid: str, role: Role, index: int, shown: Shown, first: "_First", *, previous: bool, follow: bool = False
    ) -> bool:
        """Reads the log once, from where it was left; a pod that is gone, or whose container waits, has none. False: it was cut off."""
        # A log is asked for by the pod's name, which a pod that takes its place has too; it could not print anything yet.
        if (pod := self._pods.get(uid)) is None or not await self._is_still(uid, pod["metadata"]["name"]):
            return True
        name = pod["metadata"]["name"]
        since, tail = (shown.since, None) if shown.since else (first.since, first.tail)
        shown.ask_again()
        pieces = self._api.log(
            self._jobs.namespace,
            name,
            TRAINER_CONTAINER,
            follow=follow and not previous,
            since=since,
            tail=tail,
            previous=previous,
        )
        time = 0
        try:
            async with contextlib.aclosing(whole_lines(pieces, rest_too=not follow)) as lines:
                async for line in lines:
                    stamp, text = stamped(line)
                    if stamp is None and line.startswith(_NOT_A_LINE):
                        continue
                    time = time if stamp is None else stamp
                    if shown.is_new(line, time) and first.shows():
                        await self._put(uid, LogLine(role, index, time, last_state(text)))
        except ApiError as error:
            lost = isinstance(error, Unavailable)
            if error.status in (401, 403) or (lost and not self._follow):
                raise of_answer(error, what="read the logs of pods", namespace=self._jobs.namespace) from error
            if lost:
                await asyncio.sleep(AGAIN_SECONDS)
                return False
            # 404: the pod is gone. 400: its container waits to be started, or there was none before it.
        return True

    async def _is_still(self, uid: str, name: str) -> bool:
        """Whether the pod of that name is this one."""
        try:
            pod = await self._api.get(PODS, self._jobs.namespace, name)
        except ApiError as error:
            return not isinstance(error, NotFound)  # else it cannot be known, and the log says what is wrong
        return bool(pod["metadata"]["uid"] == uid)

    async def _put(self, uid: str, line: LogLine) -> None:
        self._count[uid] += 1
        self._order.put(uid, line, self._clock())
        self._wake.set()
        while self._order.waiting(uid) >= _MOST_WAITING:
            self._room.clear()
            await self._room.wait()


class _First:
    """From where a pod's log is shown at first."""

    def __init__(self, wanted: Wanted, *, late: bool) -> None:
        self.since = "" if late else wanted.since
        # The last line is asked for even where none is wanted: it says from where to go on.
        self.tail = None if late or wanted.tail is None else max(1, wanted.tail)
        self._hidden = 1 if not late and wanted.tail == 0 else 0

    def shows(self) -> bool:
        """Whether the next line is shown."""
        self._hidden, hidden = 0, self._hidden
        return not hidden


def processes_per_worker(job: Body) -> int:
    """Ranks of a worker pod, as far as the stored job says."""
    try:
        return DistTrainJob.parse(job).spec.processes_per_worker
    except ValueError:  # of another version
        return 1


def _place(pod: Body) -> tuple[Role, int] | None:
    labels = pod["metadata"].get("labels", {})
    try:
        return Role(labels[LABEL_ROLE]), int(labels[LABEL_INDEX])
    except (KeyError, ValueError):
        return None


def _trainer(pod: Body) -> Body:
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    return next((one for one in statuses if one.get("name") == TRAINER_CONTAINER), {})


def _has_ended(pod: Body) -> bool:
    """Whether its container has ended for good."""
    phase = (pod.get("status") or {}).get("phase")
    return phase in ("Succeeded", "Failed") or (
        "terminated" in _trainer(pod).get("state", {}) and pod["spec"].get("restartPolicy") == "Never"
    )
