"""From the environment to a role, and from its end to an exit code and a termination message.

In a pod of our own loop the first process is the launcher: it imports torch, which takes seconds, and forks those that train (launcher.py).
A process connects to the master first, so that it knows who is there.
"""

import argparse
import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, assert_never

from prometheus_client.registry import Collector

from disttrain.api import environment
from disttrain.api.environment import ExitCode
from disttrain.api.names import Role
from disttrain.api.runtime import Progress
from disttrain.api.termination import Termination
from disttrain.api.trainer import Command, Loop, Script
from disttrain_trainer.checkpoint import retention
from disttrain_trainer.errors import CRASHED, ProgramFailed, Terminated, TrainerError
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.runtime import launcher, logs, machine, pod_metrics, termination, user_files
from disttrain_trainer.runtime.exposition import serve
from disttrain_trainer.runtime.launcher import Place
from disttrain_trainer.runtime.metrics import OF_STEPS, Metrics
from disttrain_trainer.runtime.pod_metrics import PodMetrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.runtime.sockets import listening_host, split_address
from disttrain_trainer.strategies.table import search_changes_nothing, side_of

CollectorT = TypeVar("CollectorT", bound=Collector)

_LONGEST_MESSAGE = 4096
"""Characters of an error that the master gets: an exception may hold a whole document."""

log = logs.get_logger(__name__)


class Entry:
    """One run of this program."""

    def __init__(self, place: Place | None = None, words: Sequence[str] = ()) -> None:
        """place: of a process that the pod's launcher has started; None: this is the first process. words: those of trainer.command, in
        which the names of variables are expanded."""
        self._place = place
        self._words = words
        self._process: Process | None = None
        self._progress: Progress | None = None
        self._control: ControlClient | None = None
        self._pid = os.getpid()
        self._ending = termination.Ending()

    def run(self) -> int:
        """Runs the role to its end; the exit code."""
        place = self._place
        machine.take_role()
        try:
            self._process = process = Process.read(
                os.environ, local_rank=place.local_rank if place else 0, restarts=place.restarts if place else None
            )
            logs.configure(process.name, process.labels)
            if process.unknown and place is None:
                fields = ", ".join(process.unknown)
                log.warning(
                    "this trainer does not know %s and ignores it; use an image of the operator's release", fields
                )
            if place is None and _has_launcher(process):
                return self._launch(process)
            self._process = process = user_files.with_digest(process)
            user_files.export(process, os.environ)
            self._take_role(process)
        except Terminated as ended:
            return self._end(ended.exit_code, Termination(message="ended by SIGTERM"))
        except ProgramFailed as failed:
            log.error("%s", failed)
            return self._end(failed.code, Termination(message=failed.last_line or str(failed), where=failed.where))
        except TrainerError as error:
            log.error("%s", error)
            return self._end(error.exit_code, Termination(message=str(error)))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and machine.interrupted():
                where = termination.of_user_error(error)[1].where
                return self._end(128 + signal.SIGINT, Termination(message="KeyboardInterrupt", where=where))
            if (missing := self._missing_data(error)) is not None:
                log.error("%s", missing)
                return self._end(ExitCode.WRONG_INPUT, Termination(message=missing))
            shown, reported = termination.of_user_error(error)
            if self._process is None or self._process.role is Role.WORKER:
                logs.show(shown)
                return self._end(ExitCode.USER_ERROR, reported)
            # This role runs no user code: the whole traceback is shown.
            log.exception("this process cannot go on, and is to be replaced: %s", reported.message)
            return self._end(CRASHED, reported.model_copy(update={"where": ""}))
        return self._end(ExitCode.DONE, Termination(done=True))

    def _missing_data(self, error: BaseException) -> str | None:
        """What to do about a file that the user's code did not find on the data volume; None for any other error."""
        volume = self._process.config.data.volume if self._process and self._process.config.data else None
        if self._process is None or volume is None or not isinstance(error, FileNotFoundError):
            return None
        root = self._process.data_dir or Path(volume.path)
        path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else Path()
        if not any(place in path.parents for place in (root, root.resolve())):
            return None
        return (
            f"there is no {path}: put {path.name} on the claim {volume.persistent_volume_claim} of data.volume, "
            f"which is mounted at {volume.path}"
        )

    def _end(self, code: int, reported: Termination) -> int:
        """Leaves the termination message, and returns the exit code. For any thread: SIGTERM may be handled in two of them, while a third
        one is at its end."""
        if os.getpid() != self._pid:
            os._exit(code)  # a child that user code forked: connections and termination message are its parent's
        if code in (ExitCode.USER_ERROR, ExitCode.WRONG_INPUT) and self._control is not None:
            self._control.send(MessageType.FAILED, message=reported.message[:_LONGEST_MESSAGE])
        path = self._process.termination_log if self._process else termination.path_in(os.environ)
        return self._ending.end(code, path, reported.model_copy(update={"progress": self._progress}))

    def _launch(self, process: Process) -> int:
        """The first process of a pod whose processes import torch: it does so for all of them, and for those that come after them."""
        machine.set_threads(os.environ, processes=_processes(process))
        if process.role is Role.PARAMETER_SERVER:
            import disttrain_trainer.parameter_server.role  # noqa: F401
        else:
            side_of(process.config).load()
        launcher.trim_memory()
        code, message = launcher.Launcher(
            process,
            run_rank=lambda place: Entry(place).run(),
            serve_metrics=lambda sockets: _serve(process, PodMetrics(sockets)),
        ).run()
        if message is not None:
            termination.write(process.termination_log, message)
        return code

    def _take_role(self, process: Process) -> None:
        if process.checkpoint_dir is not None:
            with contextlib.suppress(OSError):  # who writes there says what is wrong
                process.checkpoint_dir.mkdir(parents=True, exist_ok=True)
            # Each process, before it looks: the pod that it follows may have written its last checkpoint after others looked.
            retention.set_aside(process.checkpoint_dir, process.roll_back, config=process.config)
        if process.role is Role.MASTER:
            from disttrain_trainer.coordinator import main as master

            master.run(process, Metrics(process), self._report)
            return
        match process.config.trainer.work:
            case Command(words):
                from disttrain_trainer.strategies import command

                command.run(process, self._words or words)
            case Script() as script:
                from disttrain_trainer.strategies import script as agent

                metrics = Metrics(process)
                metrics.left_out = OF_STEPS
                agent.run(process, script, self._serve(process, metrics))
            case Loop():
                self._compute(process, self._serve(process, Metrics(process)))
            case unknown:
                assert_never(unknown)

    def _compute(self, process: Process, metrics: Metrics) -> None:
        """The roles that import torch."""
        machine.set_threads(os.environ, processes=_processes(process))
        if process.role is Role.PARAMETER_SERVER:
            from disttrain_trainer.parameter_server.role import Server

            server = Server(process, metrics)
            server.run(self._connect(process, server.describe, server.on_message))
        else:
            side = side_of(process.config)
            member = side.member()
            control = self._connect(process, member.describe, member.on_message)
            control.start()
            if process.rank == 0 and (said := search_changes_nothing(process.config)) is not None:
                log.info("%s", said)
            side.run(process, metrics, control, member)

    def _connect(
        self, process: Process, describe: Callable[[], Message], on_message: Callable[[Message], None]
    ) -> ControlClient:
        """The control connection, and with it what SIGTERM does: the process leaves when the master lets it."""
        control = ControlClient(
            process=process, describe=describe, on_message=on_message, on_released=self._end_at_once
        )
        self._control = control
        machine.on_sigterm(control.leave)
        return control

    def _end_at_once(self) -> None:
        """The end after SIGTERM: all is saved, and the main thread may be anywhere in torch or in the user's code."""
        os._exit(self._end(Terminated.exit_code, Termination(message="ended by SIGTERM")))

    def _report(self, progress: Progress) -> None:
        self._progress = progress

    def _serve(self, process: Process, metrics: CollectorT) -> CollectorT:
        if self._place is not None and self._place.metrics is not None:
            pod_metrics.answer(metrics, self._place.metrics)
        else:
            _serve(process, metrics)
        return metrics


def _has_launcher(process: Process) -> bool:
    """Whether the role is that of processes which import torch and may be started again, or are several."""
    if process.role is Role.MASTER or not isinstance(process.config.trainer.work, Loop):
        return False
    return process.pod is not None or _processes(process) > 1


def _processes(process: Process) -> int:
    """Training processes of the pod."""
    return process.config.processes_per_worker if process.role is Role.WORKER else 1


def _serve(process: Process, metrics: Collector) -> None:
    """Serves them at the port of the pod."""
    if process.metrics_port is not None:
        host = listening_host(split_address(process.config.addresses.control)[0]) or ""
        serve(metrics, host=host, port=process.metrics_port)


def main(arguments: list[str] | None = None) -> int:
    """Runs this process's role to its end; the exit code."""
    parser = argparse.ArgumentParser(prog="disttrain_trainer", description="A training process of a DistTrainJob.")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="the program of trainer.command, and its arguments")
    words = parser.parse_args(arguments).words
    parent = os.environ.get(environment.PARENT_PID, "")
    if parent.isdecimal():
        machine.die_with_parent(int(parent))
    logs.configure("-")
    machine.raise_file_limit()
    machine.note_interrupts()
    return Entry(words=words).run()
