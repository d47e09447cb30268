"""`disttrain submit FILE`: a job from its file to a cluster, and with --wait to its end.

Not here: what is wrong with a file (files.py, lint.py), what is sent (client/submitting.py).
"""

import argparse
import asyncio
import contextlib
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from disttrain.api.job import DistTrainJob
from disttrain.api.reasons import FINAL, JobState
from disttrain.cli import cluster, files, metadata
from disttrain.cli import status as texts
from disttrain.cli.cluster_logs import CONNECTIONS
from disttrain.cli.explain import explain
from disttrain.cli.files import FoundJob, JobFile, Problem, WrongInput
from disttrain.cli.lines import printer_for
from disttrain.cli.lint import problems_of
from disttrain.cli.options import WrongOption, span
from disttrain.cli.screen import PLAIN_SECONDS
from disttrain.client import submitting
from disttrain.client.code import NotUsable, config_map
from disttrain.client.errors import NotPermitted
from disttrain.client.jobs import Jobs
from disttrain.client.logs import Wanted, of_job
from disttrain.client.submitting import Submitted
from disttrain.client.watching import Api, to_its_end

COMPLETE, FAILED, WRONG, TIMED_OUT, INTERRUPTED = 0, 1, 2, 2, 130
_CODE: Final = ("spec", "trainer", "code")


@dataclass(frozen=True, slots=True)
class _Order:
    """What is to be created."""

    job: dict[str, Any]
    documents: tuple[dict[str, Any], ...]
    code: dict[str, Any] | None
    namespace: str | None
    """None: that of the context."""

    @property
    def name(self) -> str:
        return str(self.job["metadata"]["name"])


def submit(options: argparse.Namespace) -> int:
    """Exit codes: 0 created, or complete; 1 failed, 2 wrong input or not at its end in time, 130 interrupted, and those of a cluster."""
    try:
        seconds = _seconds(options)
        order = _order(options)
    except (WrongInput, WrongOption) as error:
        print(error if isinstance(error, WrongInput) else f"disttrain: {error}", file=sys.stderr)
        return WRONG
    created: list[Submitted] = []
    here = "".join(
        f" {flag} {value}" for flag, value in (("-n", order.namespace), ("--context", options.context)) if value
    )
    watch = f"`disttrain logs -f {order.name}{here}` shows it, `disttrain cancel {order.name}{here}` ends it"

    async def do(jobs: Jobs, api: Api) -> int:
        beside = [one for one in order.documents if one["metadata"].get("namespace") in (None, "", jobs.namespace)]
        for one in (one for one in order.documents if one not in beside):
            text = f"{one['kind']} {one['metadata']['name']} is of another namespace and is not created"
            print(f"{order.name}: {text}", file=sys.stderr)
        submitted = await submitting.submit(api, jobs.namespace, order.job, beside=beside, code=order.code)
        created.append(submitted)
        for note in submitted.notes:
            print(f"{order.name}: {note}", file=sys.stderr)
        if not options.wait:
            print(f"{order.name}: submitted to namespace {jobs.namespace}; {watch}")
            return COMPLETE
        print(f"{order.name}: submitted to namespace {jobs.namespace}", file=sys.stderr)
        try:
            async with asyncio.timeout(seconds) as deadline:
                return await _followed(jobs, api, submitted.job)
        except TimeoutError:
            if not deadline.expired():
                raise  # of something else, such as a terminal that does not read
            print(f"{order.name}: not at its end after {options.timeout}; it goes on: {watch}", file=sys.stderr)
            return TIMED_OUT

    try:
        return cluster.run(cluster.Where(order.namespace, options.context), do, connections=CONNECTIONS)
    except KeyboardInterrupt:
        if created:
            print(f"{order.name}: it goes on: {watch}", file=sys.stderr)
        return INTERRUPTED


def _seconds(options: argparse.Namespace) -> float | None:
    if options.timeout is None:
        return None
    if not options.wait:
        raise WrongOption("--timeout is of --wait: give both, or none")
    if (given := span(options.timeout)) is None:
        raise WrongOption(f"--timeout {options.timeout[:40]!r} is no length of time: write such as 10m or 1h30m")
    return given.total_seconds()


def _order(options: argparse.Namespace) -> _Order:
    """What the file and the folder hold. Warnings are printed. Raises WrongInput with all that is wrong."""
    file = files.read(options.file)
    found = file.only("submit")
    problems = [*file.warnings, *problems_of(found, file)]
    named = found.source.value["metadata"].get("namespace") or None
    if named and options.namespace and named != options.namespace:
        text = f"is {named}, and -n says {options.namespace}: leave one of them out"
        problems.append(found.problem(("metadata", "namespace"), text))
    body = copy.deepcopy({name: part for name, part in found.source.value.items() if name != "status"})
    body["metadata"] = metadata.cleaned({**body["metadata"], "name": found.job.metadata.name})
    code, wrong = (None, []) if options.code is None else _with_code(body, found, options.code)
    problems += wrong
    if errors := [problem for problem in problems if not problem.warning]:
        raise WrongInput(sorted(errors))
    for problem in sorted(problems):
        print(problem, file=sys.stderr)
    return _Order(body, _documents(file), code, named or options.namespace)


def _documents(file: JobFile) -> tuple[dict[str, Any], ...]:
    return tuple({name: part for name, part in one.items() if name != "status"} for one in file.documents)


def _with_code(body: dict[str, Any], found: FoundJob, folder: str) -> tuple[dict[str, Any] | None, list[Problem]]:
    """The ConfigMap of a folder's code, which the job names from then on; and what is wrong with it."""
    if found.job.spec.trainer.code is not None:
        return None, [found.problem(_CODE, "the file names the code; leave it out there, or leave out --code")]
    try:
        code = config_map(Path(folder), found.job.metadata.name)
    except NotUsable as error:
        return None, [Problem(folder, 0, text) for text in error.problems]
    except OSError as error:
        return None, [Problem(folder, 0, f"{error.filename}: {error.strerror or error}")]
    script = found.job.spec.trainer.script
    keys = [*code.get("data", {}), *code.get("binaryData", {})]
    if script is not None and script.file not in keys:
        text = f"{folder} has no {script.file}; it has {', '.join(sorted(keys))}"
        return None, [found.problem(("spec", "trainer", "script", "file"), text)]
    body["spec"]["trainer"]["code"] = {"configMap": code["metadata"]["name"]}
    try:
        DistTrainJob.parse(body)
    except ValidationError as error:
        return None, [found.problem(path, text) for path, text in explain(error)]
    return code, []


async def _followed(jobs: Jobs, api: Api, job: dict[str, Any]) -> int:
    """Prints the states of the job on standard error and its log on standard output, to its end. The exit code."""
    log, states = asyncio.create_task(_log(jobs, api, job)), asyncio.create_task(_states(api, job))
    try:
        await asyncio.wait({log, states}, return_when=asyncio.FIRST_EXCEPTION)
        if log.done():
            log.result()  # raises where standard output is gone
        last = await states
    finally:
        for task in (log, states):
            task.cancel()
        await asyncio.gather(log, states, return_exceptions=True)
    if last is None:
        print(f"{job['metadata']['name']}: it was deleted", file=sys.stderr)
        return FAILED
    print(texts.outcome(last), file=sys.stderr)
    return COMPLETE if texts.state(last) == JobState.COMPLETE else FAILED


async def _log(jobs: Jobs, api: Api, job: dict[str, Any]) -> None:
    shows = printer_for(sys.stdout)
    try:
        async with contextlib.aclosing(of_job(jobs, api, job, Wanted(), follow=True)) as lines:
            async for some in lines:
                shows(some)
    except NotPermitted as error:
        print(f"{job['metadata']['name']}: without its log: {error}", file=sys.stderr)


async def _states(api: Api, job: dict[str, Any]) -> dict[str, Any] | None:
    """The job at its end; None where it was deleted."""
    says = _sayer()
    last: dict[str, Any] | None = job
    async for last in to_its_end(api, job):
        if last is not None and texts.state(last) not in FINAL:
            says(last)
    return last


def _sayer() -> Callable[[dict[str, Any]], None]:
    """Prints a new state, or reason to wait, at once, and new numbers every few seconds."""
    last, said_at = "", 0.0

    def says(job: dict[str, Any]) -> None:
        nonlocal last, said_at
        line, now = texts.line(job), time.monotonic()
        training = f"{job['metadata']['name']}: Training"
        hurry = not (line.startswith(training) and last.startswith(training))
        if line != last and (hurry or now - said_at >= PLAIN_SECONDS):
            print(line, file=sys.stderr)
            last, said_at = line, now

    return says
