"""The agent of a script: runs the user's file unchanged, as torchrun would, in one round after another.

When a member is lost, every agent stops its program and starts it again in the next round; the store at the master keeps the
rounds apart.
"""

import os
import signal
import socket
import sys
from pathlib import Path

from disttrain.api import environment
from disttrain.api.runtime import JobConfig
from disttrain.api.trainer import Script
from disttrain_trainer.errors import Terminated, WrongInput
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.runtime import logs, machine, script_runner, termination, user_files
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.runtime.sockets import split_address
from disttrain_trainer.runtime.subprocesses import Program
from disttrain_trainer.strategies import joining, printed_progress

log = logs.get_logger(__name__)

PEER_LOSS_NOTICE_SECONDS = 1.0
"""Seconds that the master has to end the round because of another member, before this agent reports its failed program as the cause."""
STOP_GRACE_SECONDS = 10.0
"""Seconds between SIGTERM and SIGKILL, for a program whose round is over."""
LOOPBACK = "127.0.0.1"
MAX_RESTARTS = "999"
"""How often the agent would start the script again, for a script that reads it. The agent has no limit; the job's runPolicy has."""


class Agent:
    """The agent of one pod."""

    def __init__(self, process: Process, script: Script, metrics: Metrics) -> None:
        self._process = process
        self._metrics = metrics
        self.rank = CollectiveMember()
        self._file = file_of(script, process.config)
        self._arguments = script.args
        self._program: Program | None = None
        self._terminated = False
        self._held: socket.socket | None = None
        self._control = ControlClient(
            process=process,
            describe=self.rank.describe,
            on_message=self._on_message,
            on_released=lambda: None,
            agent=True,
        )

    def run(self) -> None:
        """Runs until every member's program is done. Raises ProgramFailed when this one's failed of itself, Terminated after SIGTERM."""
        control, rank = self._control, self.rank
        machine.on_sigterm(self._terminate)
        machine.set_interface(os.environ, toward=split_address(self._process.config.addresses.rendezvous)[0])
        control.start()
        while not self._terminated:
            rank.get_ready(control)
            this_round = control.wait(
                lambda: "over" if self._terminated or control.finished else rank.begun,
                what="the other workers and the master",
                timeout=self._process.config.startup_timeout_seconds,
            )
            if control.finished:
                return
            if isinstance(this_round, Round) and rank.round is this_round and self.run_in(this_round):
                return
            self._metrics.recoveries += 1
        raise Terminated

    def run_in(self, this_round: Round) -> bool:
        """Runs the program in one round. True when the job is done, False when the round is over."""
        control, rank = self._control, self.rank
        program = self._start(this_round)
        log.info("round %d begins: the script runs", this_round.number)

        def over() -> bool:
            return rank.round is not this_round

        def result() -> int | None:
            if (
                self._terminated
            ):  # it may save its state until the pod's grace period is over, whatever becomes of the others
                return -1 if program.ended() else None
            return -1 if over() else program.result()

        try:
            # A training may take any time, and the log has its line already.
            code = control.wait(result, what="the script", timeout=None, logged=True)
            if code == 0:
                rank.get_done(control)
                return self._await_end(this_round)
            if code > 0:
                with control.changed:
                    control.changed.wait_for(lambda: over() or self._terminated, PEER_LOSS_NOTICE_SECONDS)
                if not over() and not self._terminated:
                    failure = program.failure(code)
                    failure.last_line += termination.shadowing(failure.last_line, self._file.resolve().parent)
                    # When the master is lost now, its successor sends REFORM, since it did not begin this round.
                    control.send(MessageType.FAILED, message=failure.last_line or str(failure))
                    control.wait(
                        lambda: True if rank.blamed or over() or self._terminated else None,
                        what="the master to decide which member failed first",
                        timeout=self._process.config.startup_timeout_seconds,
                    )
                    if rank.blamed and not self._terminated:
                        if rank.ended_before:
                            names = ", ".join(rank.ended_before)
                            failure.last_line += f"; the script had ended with exit code 0 before on {names}"
                        raise failure
                if not self._terminated:
                    failure = program.failure(code)
                    log.warning(
                        "another worker failed or was lost before this one failed: %s", failure.last_line or failure
                    )
            if not self._terminated:
                log.info("round %d is over: a worker was lost", this_round.number)
            return False
        finally:
            program.stop(grace=STOP_GRACE_SECONDS, patient=lambda: self._terminated)
            if self._held is not None:
                self._held.close()
                self._held = None

    def _start(self, this_round: Round) -> Program:
        """Starts the program of a round. Raises Terminated after SIGTERM."""
        config = self._process.config
        user_files.check_unchanged(self._process)
        command = [sys.executable, script_runner.__file__, str(self._file), *self._arguments]
        environs = [
            contract(config, index=self._process.index, local_rank=local_rank, this_round=this_round)
            for local_rank in range(config.processes_per_worker)
        ]
        if config.world_size == 1 and not config.elastic:
            environs[0] = alone(environs[0], port=self._port_of_its_own())
        with self._control.changed:
            if self._terminated:
                raise Terminated
            readers = printed_progress.readers(
                config,
                ranks=[int(environ[environment.RANK]) for environ in environs],
                round_number=this_round.number,
                metrics=self._metrics,
            )
            self._program = Program(command, environs, changed=self._control.changed, readers=readers)
            return self._program

    def _port_of_its_own(self) -> int:
        """A port of loopback that no other program is given in this round. A program that sets SO_REUSEADDR, as every server
        does, can listen on it all the same."""
        if self._held is None:
            self._held = socket.socket()
            self._held.bind((LOOPBACK, 0))
            self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return int(self._held.getsockname()[1])

    def _await_end(self, this_round: Round) -> bool:
        """Blocks until every member's program is done: True. False when the round is over before, or this pod must end."""
        control, rank = self._control, self.rank
        control.wait(
            lambda: True if self._terminated or control.finished or rank.round is not this_round else None,
            what="the others to finish",
            timeout=None,  # what a script does at its end may take its time
        )
        return control.finished

    def _on_message(self, message: Message) -> None:
        self.rank.on_message(message)
        if message["type"] == MessageType.NOT_JOINED and self._program is not None:
            spawned = joining.spawns(self._program.pids)
            if self._process.config.world_size > 1:
                seconds = float(message.get("seconds") or 0)
                log.warning("%s", joining.hint(self._process.config, seconds=seconds, spawned=spawned))

    def _terminate(self) -> None:
        """SIGTERM: the program gets it too, and has the grace period; then this process ends with 143, not with 0."""
        with self._control.changed:
            self._terminated = True
            program = self._program
            self._control.changed.notify_all()
        if program is not None:
            program.signal(signal.SIGTERM)


def contract(config: JobConfig, *, index: int, local_rank: int, this_round: Round) -> dict[str, str]:
    """torchrun's environment of a training process, the one of this number in its pod. Of an elastic job ranks and world are those of
    the round, as torchrun's are those of its rendezvous."""
    host, port = split_address(config.addresses.rendezvous)
    count = config.processes_per_worker
    if this_round.members:
        together = config.workers_per_machine > 1
        here = len(this_round.members) if together else 1
        config = config.model_copy(update={"workers": len(this_round.members), "workers_per_machine": here})
    index = this_round.place(index)
    rank = index * count + local_rank
    return {
        environment.MASTER_ADDR: host,
        environment.MASTER_PORT: str(port),
        environment.RANK: str(rank),
        environment.WORLD_SIZE: str(config.world_size),
        environment.LOCAL_RANK: str(config.local_rank(rank)),
        environment.LOCAL_WORLD_SIZE: str(config.local_world_size),
        environment.GROUP_RANK: str(config.group_rank(index)),
        environment.GROUP_WORLD_SIZE: str(config.groups),
        environment.ROLE_NAME: "default",
        environment.ROLE_RANK: str(rank),
        environment.ROLE_WORLD_SIZE: str(config.world_size),
        environment.USE_AGENT_STORE: "True",
        environment.RESTART_COUNT: str(this_round.number - 1),
        environment.MAX_RESTARTS: MAX_RESTARTS,
        environment.ELASTIC_RUN_ID: config.uid,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, machine.cpu_limit() // count)),
    }


def alone(environ: dict[str, str], *, port: int) -> dict[str, str]:
    """The same for the only process of a job: no other one needs a store, so that the program has its own, as without torchrun. One that
    starts its processes itself, by torch.multiprocessing.spawn, can connect them then."""
    own = {environment.MASTER_ADDR: LOOPBACK, environment.MASTER_PORT: str(port)}
    return {name: value for name, value in environ.items() if name != environment.USE_AGENT_STORE} | own


def file_of(script: Script, config: JobConfig) -> Path:
    """The user's file: of trainer.code, which the operator names in full, or in the image or the current folder. Raises WrongInput."""
    path = Path(script.file)
    if path.is_file():
        return path.absolute()
    origin = config.code_origin or f"{Path.cwd()} or the image"
    raise WrongInput(f"trainer.script.file: {script.file!r} is not in {origin}; put it there, or correct the name")


def run(process: Process, script: Script, metrics: Metrics) -> None:
    """The role of a script's agent."""
    Agent(process, script, metrics).run()
