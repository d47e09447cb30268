"""One life: jobs from their creation to their end, the operators that serve them, and the faults; all of it follows from a seed.

`Life.run` holds the life against the calm one, in which the same happens to the jobs and nothing fails.
"""

import contextlib
import functools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from disttrain.kube.api import JOBS, OPTIONAL, PODS, ApiError, Body, Refused, Resource
from simulation.controller.api_server import ApiServer, Change
from simulation.controller.cluster import Cluster
from simulation.controller.digest import difference, digest, sorted_together, without_accounts
from simulation.controller.faults import AT_A_PROCESS, AT_A_REQUEST, AT_A_WATCH, Fault, Kind, draw
from simulation.controller.operators import Operator
from simulation.controller.oracle import Oracle, Violation
from simulation.controller.schemas import newer, older, refused_by_older
from simulation.controller.stories import (
    OPTIONS,
    SPECS,
    STORIES,
    Condition,
    Job,
    Story,
    deleted_and_made_again,
    expired,
    pod_of_another_namespace,
    quota_is_full,
)
from simulation.controller.world import World

TICK_SECONDS = 0.5
LONGEST = 2400.0
"""Seconds of a life."""
QUIET_SECONDS = 75.0
"""After the last job has ended, for a comparison with the API server and for a mute watch to begin again."""
LEASE_SECONDS = 15.0
GANG_EVERY = 6
"""Of so many seeds one has a gang scheduler, one kind after the other. It is not drawn: what a seed draws stays as it was."""
WRITES_OF_A_FAULT = 3
AT_REQUESTS = (*AT_A_REQUEST, *AT_A_PROCESS, Kind.OLDER_LIST)
SHORT_DEADLINE = 3
"""Number of the options with it."""
GANGS = ("Coscheduling", "Volcano")
NAMESPACES = ("blue", "green")
MOST_READ = 24
"""Objects that are read in a calm life in which a former job holds the names, and conflicts there."""
MOST_REFUSED = 16
"""Pods that are refused in a calm life with a full quota."""


@dataclass(frozen=True, slots=True)
class Course:
    """What happens to the jobs of a life."""

    jobs: tuple[tuple[str, str, int, int], ...]
    """Namespace, kind of spec, number of the options, number of the story."""
    liar: bool = False
    """A pod of the other namespace claims to be the first job's."""
    split: bool = False
    """Each operator serves a namespace of its own."""
    gang: str = ""
    """The gang scheduler of the cluster, which the jobs ask for."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a life went."""

    digest: Any
    writes: int
    progress_writes: int
    seconds: float
    faults: int
    slack: int = 0
    """Writes that are done a second time because the API server lost them."""
    gets: int = 0
    conflicts: int = 0
    refused: int = 0
    reasons: frozenset[str] = frozenset()
    """Of the conditions that were ever written."""


def course_of(seed: int) -> tuple[Course, tuple[Fault, ...], random.Random]:
    """What a seed stands for: what happens, what fails, and the small delays."""
    choices = random.Random(seed)
    count = choices.choice((1, 1, 1, 2))
    jobs = tuple(
        (namespace, choices.choice(tuple(SPECS)), choices.randrange(len(OPTIONS)), choices.randrange(len(STORIES)))
        for namespace in NAMESPACES[:count]
    )
    # A start-up deadline that is shorter than a watch may be mute: for jobs that do nothing else but start.
    jobs = tuple((job[0], "loop", SHORT_DEADLINE, 0) if job[2] == SHORT_DEADLINE else job for job in jobs)
    course = Course(
        jobs,
        liar=count == 1 and choices.random() < 0.1,
        split=count == 2 and choices.random() < 0.3,
        gang=GANGS[seed // GANG_EVERY % len(GANGS)] if seed % GANG_EVERY == GANG_EVERY // 2 else "",
    )
    faults = draw(choices)
    if any(options == SHORT_DEADLINE for _, _, options, _ in jobs):
        # What is called wrong is tried again after a minute, which is longer than that deadline.
        faults = tuple(fault for fault in faults if fault.kind is not Kind.INVALID)
    return course, faults, choices


class Life:
    """A world with everything in it."""

    def __init__(
        self,
        course: Course,
        faults: tuple[Fault, ...],
        choices: random.Random,
        *,
        stories: Sequence[Story] = STORIES,
        trace: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._stories_of_all = stories
        self._course, self._faults, self._trace = course, faults, trace
        self.world = World()
        self.server = ApiServer(self.world.clock)
        self.server.absent = frozenset() if course.gang else OPTIONAL
        self.cluster = Cluster(self.world, self.server)
        late = any(fault.kind in (Kind.FREEZE, Kind.OVERLAP, Kind.LATE) for fault in faults)
        woken = any(fault.kind is Kind.FREEZE and fault.seconds > LEASE_SECONDS for fault in faults)
        self.oracle = Oracle(self.server, self.cluster, late=late, woken=woken)
        self.server.changed = self._changed
        self._happened = 0
        at_requests = [fault for fault in faults if fault.kind in AT_REQUESTS]
        self.operators = [
            Operator(
                name,
                self.world,
                self.server,
                self.cluster,
                choices,
                faults=at_requests if name == "a" else (),
                namespaces=(NAMESPACES[number],) if course.split else (),
                befall=self._befall_process,
                wrote=lambda operator: functools.partial(self.oracle.wrote, operator),
                refuse=self._refuse,
                trace=self._say,
            )
            for number, name in enumerate("ab")
        ]
        self.jobs = [
            Job(
                self.cluster,
                namespace,
                "digits",
                kind,
                OPTIONS[options] | ({"scheduling": {"gang": course.gang}} if course.gang else {}),
            )
            for namespace, kind, options, _ in course.jobs
        ]
        self._stories: list[Iterator[Condition]] = []
        self._last_write = 0.0
        self._oldest_backup = 0
        """Version of the last thing that a user did."""
        self._slack = 0
        self._older_schema = False

    def run(self) -> Outcome:
        """Lives it to its end. Raises Violation."""
        try:
            with exceptions(self.world.errors):
                return self._run()
        finally:
            self.world.dispose()

    def _run(self) -> Outcome:
        world = self.world
        for operator in self.operators if self._course.split else self.operators[:1]:
            operator.lead()
        for job, (*_, story) in zip(self.jobs, self._course.jobs, strict=True):
            job.create()
            self._follow(job, self._stories_of_all[story](job))
        if self._course.liar:
            pod_of_another_namespace(self.cluster, NAMESPACES[1], self.jobs[0])
            self._oldest_backup = self.server.version
        for fault in self._faults:
            if fault.kind not in AT_REQUESTS:
                world.after(float(fault.at), self._befall, fault)
        self._wait(self._all_ended, "the jobs do not end")
        end = world.now
        self._wait(lambda: world.now > max(end + QUIET_SECONDS, self._last_write + 20.0), "it does not come to rest")
        self.oracle.over = True
        for operator in self.operators:
            operator.queue_all()
        world.run(lambda: False, most=world.now + 5.0)
        if world.errors:
            raise Violation(world.errors[0])
        self.oracle.check_end()
        happened = self._happened + sum(len(operator.requests.happened) for operator in self.operators)
        requests = [operator.requests for operator in self.operators]
        return Outcome(
            digest=digest(self.server),
            writes=sum(self.oracle.writes.values()),
            progress_writes=self.oracle.progress_writes,
            seconds=end,
            faults=happened,
            slack=self._slack,
            gets=sum(one.gets for one in requests),
            conflicts=sum(one.conflicts for one in requests),
            refused=sum(one.refused for one in requests),
            reasons=frozenset(self.oracle.reasons),
        )

    # Parts

    def _say(self, text: str) -> None:
        self._trace(f"{self.world.now:8.3f} {text}")

    def _changed(self, resource: Resource, change: Change) -> None:
        self.oracle.see(resource, change)
        self.cluster.see(resource, change)
        self._last_write = self.world.now
        for operator in self.operators:
            operator.changed(resource, change)

    def _refuse(self, verb: str, resource: Resource, namespace: str, body: Body) -> ApiError | None:
        if verb == "create" and resource is PODS and namespace in self.cluster.full:
            return Refused(403, "Forbidden", "exceeded quota: pods")
        return refused_by_older(resource, body) if self._older_schema and verb == "patch" else None

    def _follow(self, job: Job, story: Iterator[Condition]) -> None:
        def tick(condition: Condition) -> None:
            while condition():
                self._say(f"story of {job.namespace}: goes on")
                following = next(story, None)
                self._oldest_backup = self.server.version
                if following is None:
                    self._stories.remove(story)
                    if job.uid in self.cluster.trainings:
                        job.training.finish()
                    return
                condition = following
            self.world.after(TICK_SECONDS, tick, condition)

        self._stories.append(story)
        first = next(story)
        self._oldest_backup = self.server.version
        tick(first)

    def _all_ended(self) -> bool:
        return not self._stories and all(job.gone() or job.ended() for job in self.jobs)

    def _wait(self, condition: Condition, problem: str) -> None:
        if not self.world.run(condition, most=LONGEST):
            states = [(job.status.get("state"), job.status.get("conditions")) for job in self.jobs]
            raise Violation(f"{problem}: {states}")

    def _befall(self, fault: Fault) -> None:
        """A fault that is none of a request."""
        self._happened += 1
        self._say(f"! {fault}")
        if fault.kind in AT_A_WATCH:
            for operator in self.operators:
                operator.suffer(fault)
        elif fault.kind is Kind.RESTORE:
            self._restore(self.server.version - int(fault.seconds * 2))
        elif fault.kind in (Kind.NEWER_SCHEMA, Kind.OLDER_SCHEMA):
            self.server.admit = newer if fault.kind is Kind.NEWER_SCHEMA else older
            self._older_schema = fault.kind is Kind.OLDER_SCHEMA
            if fault.kind is Kind.NEWER_SCHEMA:
                for body in self.server.list(JOBS, None)[0]:
                    # The API server gives defaults when it answers; a version that all watches see is not much else.
                    self.server.patch(JOBS, *_key(body), {"metadata": {"labels": {"seen": "by-newer"}}})

    def _befall_process(self, fault: Fault) -> None:
        """The leader is frozen, or another one acts beside it."""
        first, second = self.operators
        process = first.process
        if process is None or self._course.split:
            return
        self._say(f"! {fault}")
        if fault.kind is Kind.FREEZE:
            process.freeze()
            self.world.after(fault.seconds, process.thaw)
        if (fault.kind is Kind.OVERLAP or fault.seconds > LEASE_SECONDS) and not second.active:
            # The other one takes the Lease over, and the first one finds that out some time later: that is a fault more.
            self._happened += 1
            self.world.after(0.0 if fault.kind is Kind.OVERLAP else LEASE_SECONDS, second.lead)
            self.world.after(fault.seconds + 1.0, first.resign)

    def _restore(self, version: int) -> None:
        version = max(version, self._oldest_backup)
        self._slack += self.server.version - version
        self.server.restore(version)
        self.cluster.restored()
        for operator in self.operators:
            operator.reconnect()


def _key(body: Body) -> tuple[str, str]:
    return body["metadata"]["namespace"], body["metadata"]["name"]


class _Exceptions(logging.Handler):
    """Collects what passes do not handle."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is not None and record.exc_info[1] is not None:
            error = record.exc_info[1]
            self._errors.append(f"{record.getMessage()}: {type(error).__name__}: {error}")


@contextlib.contextmanager
def exceptions(errors: list[str]) -> Iterator[None]:
    """Silences the operator's log for a block, but for exceptions that nothing expects."""
    log, handler = logging.getLogger("disttrain"), _Exceptions(errors)
    before = log.level, log.propagate
    log.setLevel(logging.ERROR)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before


@functools.lru_cache(maxsize=4096)
def calm(course: Course) -> Outcome:
    """The same without faults; of two jobs what each comes to alone, since neither may see anything of the other."""
    if len(course.jobs) == 1:
        outcome = Life(course, (), random.Random(0)).run()
        _check_calm(course, outcome)
        return outcome
    alone = [calm(replace(course, jobs=(job,), split=False)) for job in course.jobs]
    return Outcome(
        digest={part: sorted_together(outcome.digest[part] for outcome in alone) for part in alone[0].digest},
        writes=sum(outcome.writes for outcome in alone),
        progress_writes=sum(outcome.progress_writes for outcome in alone),
        seconds=max(outcome.seconds for outcome in alone),
        faults=0,
    )


def _check_calm(course: Course, outcome: Outcome) -> None:
    """Without faults there is no need to read anything, or to be told of a conflict; a quota that is full is asked every ten seconds."""
    former = STORIES[course.jobs[0][3]] is deleted_and_made_again
    if (outcome.gets or outcome.conflicts) and not former and STORIES[course.jobs[0][3]] is not expired:
        raise Violation(f"without faults: {outcome.gets} objects are read, {outcome.conflicts} answers are conflicts")
    if "PodRefused" in outcome.reasons and STORIES[course.jobs[0][3]] is not quota_is_full:
        raise Violation("without faults: a status says that a pod was refused")
    if outcome.gets > MOST_READ or outcome.conflicts > MOST_READ or outcome.refused > MOST_REFUSED:
        raise Violation(
            f"without faults: {outcome.gets} reads, {outcome.conflicts} conflicts, {outcome.refused} refusals"
        )


def run(seed: int, *, trace: Callable[[str], None] = lambda _: None, only: tuple[int, ...] | None = None) -> Outcome:
    """Lives the life of a seed. Raises Violation. only: the numbers of the faults that happen, None for all."""
    course, faults, choices = course_of(seed)
    if only is not None:
        faults = tuple(fault for number, fault in enumerate(faults) if number in only)
    wanted = calm(course)
    found = Life(course, faults, choices, trace=trace).run()
    ends = wanted.digest, found.digest
    if any(fault.kind is Kind.RESTORE for fault in faults):
        ends = without_accounts(ends[0]), without_accounts(ends[1])
    if ends[0] != ends[1]:
        raise Violation(f"another end than without faults: {difference(*ends)}")
    # Writes of a status that can wait become one, or do not, by the milliseconds that requests take.
    most = wanted.writes + 2 + WRITES_OF_A_FAULT * found.faults + found.slack
    if found.writes > most:
        raise Violation(f"{found.writes} writes, where {wanted.writes} do without {found.faults} faults")
    return found
