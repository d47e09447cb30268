"""`disttrain run FILE`: a job from its file to its exit code. Not here: the run itself (disttrain.local), the display (screen.py)."""

import asyncio
import json
import signal
import sys
import time

from disttrain.api.job import DistTrainJob
from disttrain.api.names import MANAGED_BY
from disttrain.api.reasons import State
from disttrain.cli import files
from disttrain.cli.files import FoundJob, JobFile, Problem, WrongInput
from disttrain.cli.screen import screen_for
from disttrain.cli.summary import summary
from disttrain.local.addresses import Ports
from disttrain.local.documents import Documents, Unusable
from disttrain.local.folders import NothingToResume, RunFolder
from disttrain.local.programs import Programs
from disttrain.local.runner import Run, admitted

COMPLETE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


def run(name: str, *, resume: bool, json_output: bool, quiet: bool) -> int:
    """Runs the job of a file and says how it ended by the exit code."""
    try:
        file = files.read(name, sys.stdin.read() if name == "-" else None)
        found = _only_job(file)
        folder = RunFolder.resume(found.job.metadata.name) if resume else RunFolder.new(found.job.metadata.name)
    except (WrongInput, NothingToResume) as error:
        print(error, file=sys.stderr)
        return WRONG

    ports = Ports()
    try:
        job = admitted(found.job, folder)
        programs = Programs(job, Documents(file.documents), folder, ports)
        for problem in [
            *file.warnings,
            *(found.problem(path, text, warning=True) for path, text in programs.warnings()),
        ]:
            print(problem, file=sys.stderr)
        began = time.monotonic()
        screen = screen_for(sys.stderr if json_output else sys.stdout, job, quiet=quiet)
        job_run = Run(job, programs, folder, ports, screen)
        with screen:
            job = asyncio.run(_with_signals(job_run))
        screen.say(summary(job, folder, seconds=time.monotonic() - began, interrupted=job_run.interrupted))
    except Unusable as error:
        folder.discard()
        print(found.problem(error.path, error.message), file=sys.stderr)
        return WRONG
    finally:
        ports.close()
        folder.close()
    if json_output:
        json.dump(job.to_dict(), sys.stdout, indent=2)
        print()
    return _exit_code(job, interrupted=job_run.interrupted)


def _exit_code(job: DistTrainJob, *, interrupted: bool) -> int:
    match job.status.state:
        case State.COMPLETE:
            return COMPLETE
        case State.FAILED:
            return FAILED
        case _:
            return INTERRUPTED if interrupted else WRONG


async def _with_signals(job_run: Run) -> DistTrainJob:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, job_run.interrupt)
    try:
        return await job_run.to_its_end()
    except BaseExceptionGroup as group:
        # Whoever read our output is gone (`| head`): each task that tried to write says so.
        if group.split(BrokenPipeError)[1] is None:
            raise BrokenPipeError from None
        raise


def _only_job(file: JobFile) -> FoundJob:
    """The job of the file, if it is one that can be run here. Raises WrongInput."""
    if len(file.jobs) != 1:
        names = ", ".join(found.job.metadata.name for found in file.jobs)
        raise WrongInput(
            [
                Problem(
                    file.name,
                    1,
                    f"holds {len(file.jobs)} jobs ({names}); a run takes one: put each into a file of its own",
                )
            ]
        )
    (found,) = file.jobs
    spec = found.job.spec
    if spec.suspend:
        raise WrongInput([found.problem(("spec", "suspend"), "a suspended job has nothing to run; set it to false")])
    if spec.managed_by != MANAGED_BY:
        raise WrongInput(
            [
                found.problem(
                    ("spec", "managedBy"), f"another controller runs this job; leave it out, or set {MANAGED_BY}"
                )
            ]
        )
    return found
