"""`disttrain run FILE`: a job from its file to its exit code. Not here: the run itself (disttrain.local), the display (screen.py)."""

import asyncio
import contextlib
import json
import signal
import sys
import time

from disttrain.api.job import DistTrainJob
from disttrain.api.names import MANAGED_BY
from disttrain.api.reasons import JobState
from disttrain.cli import files
from disttrain.cli.files import FoundJob, JobFile, WrongInput
from disttrain.cli.screen import Screen, screen_for
from disttrain.cli.summary import summary
from disttrain.local.addresses import Ports
from disttrain.local.documents import Documents
from disttrain.local.folders import NothingToResume, RunFolder
from disttrain.local.programs import Programs
from disttrain.local.references import Unusable
from disttrain.local.runner import Run, admitted

COMPLETE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


def run(name: str, *, resume: bool, json_output: bool, quiet: bool) -> int:
    """Runs the job of a file and says how it ended by the exit code."""
    try:
        file = files.read(name)
        found = _only_job(file, resume=resume)
        folder = RunFolder.resume(found.job.metadata.name) if resume else RunFolder.new(found.job.metadata.name)
    except (WrongInput, NothingToResume) as error:
        print(error, file=sys.stderr)
        return WRONG
    except OSError as error:
        print(_unwritable(error), file=sys.stderr)
        return WRONG

    ports = Ports()
    job_run: Run | None = None
    try:
        if mistake := _other_parts(found, folder):
            raise Unusable(("spec", "trainer", "partsPerStep"), mistake)
        job = admitted(found.job, folder)
        programs = Programs(job, Documents(file.beside(found)), folder, ports)
        for problem in [
            *file.warnings,
            *(found.problem(path, text, warning=True) for path, text in programs.warnings()),
        ]:
            print(problem, file=sys.stderr)
        began = time.monotonic()
        screen = screen_for(sys.stderr if json_output else sys.stdout, job, quiet=quiet)
        job_run = Run(job, programs, folder, ports, screen)
        with screen:
            job = asyncio.run(_with_signals(job_run, screen, log_folder=str(folder.path / "logs")))
        screen.print_line(summary(job, folder, seconds=time.monotonic() - began, interrupted=job_run.interrupted))
    except Unusable as error:
        print(found.problem(error.path, error.message), file=sys.stderr)
        return WRONG
    except OSError as error:
        if job_run is not None and job_run.began:
            raise
        print(_unwritable(error), file=sys.stderr)
        return WRONG
    finally:
        if job_run is None or not job_run.began:
            folder.discard()
        ports.close()
        folder.close()
    if json_output:
        json.dump(job.to_dict(), sys.stdout, indent=2)
        print()
    if isinstance(screen.lost, BrokenPipeError) and job_run.interrupted:
        return FAILED
    return _exit_code(job, interrupted=job_run.interrupted)


def _exit_code(job: DistTrainJob, *, interrupted: bool) -> int:
    match job.status.state:
        case JobState.COMPLETE:
            return COMPLETE
        case JobState.FAILED:
            return FAILED
        case _:
            return INTERRUPTED if interrupted else WRONG


async def _with_signals(job_run: Run, screen: Screen, *, log_folder: str) -> DistTrainJob:
    """The run, with what ends it before its time: signals, and a reader that is gone (`| head`)."""
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        screen.hurry()
        if seconds := job_run.interrupt():
            what = " for a checkpoint" if job_run.job.spec.checkpoint else ""
            screen.print_line(f"stopping: up to {seconds:g} s{what}; Ctrl-C again ends it at once")

    def lost(error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            with contextlib.suppress(RuntimeError):  # the loop has ended, and so has the run
                loop.call_soon_threadsafe(interrupt)
        else:
            with contextlib.suppress(OSError):
                print(f"the output cannot be written: {error.strerror}; the logs are in {log_folder}", file=sys.stderr)

    screen.when_lost(lost)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # The program that started us may have asked that we outlive this signal: nohup, or a shell that runs us in the background.
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, interrupt)
    return await job_run.to_its_end()


def _other_parts(found: FoundJob, folder: RunFolder) -> str:
    """What is wrong with trainer.partsPerStep of a job that goes on; "" when nothing is."""
    named, former = found.job.spec.trainer.parts_per_step, folder.former
    if named is None or former is None or former.status.training is None or not former.status.training.step:
        return ""
    before = former.status.parts_per_step or former.spec.default_parts_per_step
    if named == before:
        return ""
    return (
        f"{named}, but the steps of this run were made of {before} parts each: write {before}, or leave it out; without --resume a new run "
        "starts at step 0"
    )


def _unwritable(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}; a run keeps its logs and checkpoints there: run in a folder that you may write to"


def _only_job(file: JobFile, *, resume: bool) -> FoundJob:
    """The job of the file, if it is one that can be run here. Raises WrongInput."""
    found = file.only("run")
    spec = found.job.spec
    problems = [*found.not_yet_supported(), *found.factories_by_file(), *found.groups_by_no_pattern()]
    if spec.suspend:
        problems.append(found.problem(("spec", "suspend"), "a suspended job has nothing to run; set it to false"))
    if spec.managed_by != MANAGED_BY:
        message = f"another controller runs this job; leave it out, or set {MANAGED_BY}"
        problems.append(found.problem(("spec", "managedBy"), message))
    if resume and spec.checkpoint is None:
        message = "without checkpoint there is nothing to resume; leave --resume out to start a new run"
        problems.append(found.problem(("spec",), message))
    if problems:
        raise WrongInput(sorted(problems))
    return found
