"""A rank of a training with collectives from its start to its end: round after round, through lost peers.

What it holds and what it does in a round is the strategy's: collective.py for whole models, sharded.py for parts of one.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NoReturn, Protocol

import torch
import torch.distributed as dist

from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.errors import UserError
from disttrain_trainer.loop.exchange import Exchange
from disttrain_trainer.loop.loop import TrainingLoop
from disttrain_trainer.loop.meter import NonFinite
from disttrain_trainer.loop.trained import Trained
from disttrain_trainer.model import task as tasks
from disttrain_trainer.model import user_code
from disttrain_trainer.net import copies, transport
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.parallel.process_group import AbortableProcessGroup, process_group
from disttrain_trainer.parallel.traffic import Traffic
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.strategies import first_evaluation

log = logs.get_logger(__name__)

PEER_LOSS_NOTICE_SECONDS = 3.0
"""Seconds within which the master reports the loss of a peer that broke a step."""
MAX_BREAKS = 3
"""Rounds in a row that may break at one step in the same way while no peer is lost."""


class RoundEnded(Exception):
    """The master ended the round."""


class RolledBack(RoundEnded):
    """The round ended because its loss was not finite."""


class RoundResized(RoundEnded):
    """The round ended after a whole step: members of an elastic job join or leave."""


class Saves(Protocol):
    """The checkpoints that a rank writes."""

    def wait(self) -> None:
        """Blocks until nothing is being written."""

    def keep_left_out(self, course: Course) -> None:
        """Rank 0, after it went back to a checkpoint."""

    def answer(self) -> None:
        """Rank 0, between two tries of a last file: the master asks for the state after the last step."""


def over(
    member: CollectiveMember, control: ControlClient, saves: Saves | None, this_round: Round, seconds: float
) -> bool:
    """Waits until the round ends, so many seconds at most; whether it has ended. Where the master asks for the state meanwhile, it gets it.

    saves: None for a rank that writes no checkpoints, which has no answer. Raises what the control connection failed with.
    """
    with control.changed:
        control.changed.wait_for(
            lambda: (saves is not None and member.save_asked) or member.round is not this_round, seconds
        )
    control.check()
    if saves is not None and member.save_asked:
        saves.answer()
    return member.round is not this_round


class Rank(ABC):
    """One rank of the job."""

    def __init__(self, *, process: Process, metrics: Metrics, control: ControlClient, member: CollectiveMember) -> None:
        self._process = process
        self._config: JobConfig = process.config
        self._metrics = metrics
        self._control = control
        self._member = member
        self._transport = transport.of(self._config, process.tls_dir)
        with copies.kept(process, self._transport):
            self._task = tasks.build(
                self._config, rank=process.rank, local_rank=process.machine_rank, incarnation=process.incarnation
            )
            first_evaluation.attempt(self._task, process)
        self._backend = tasks.choose_backend(self._config, self._task.device)
        if self._backend == "nccl":
            metrics.left_out |= {"disttrain_communication_bytes"}  # NCCL reports no bytes
        self._traffic = Traffic()
        metrics.before_scrape = self._count
        self._breaks: tuple[tuple[int, str], int] = ((0, ""), 0)
        """The step and the error at which a round broke although no peer was lost, and how many did so in a row."""

    @property
    @abstractmethod
    def saves(self) -> Saves | None:
        """What this rank writes checkpoints with."""

    @abstractmethod
    def resume(self) -> None:
        """Before the first round: what this rank knows of the newest checkpoint. Raises WrongInput."""

    @abstractmethod
    def go_back(self) -> None:
        """The loss was not finite: forgets the state, and resumes as a new process would."""

    @abstractmethod
    def take_part_in(self, this_round: Round) -> None:
        """One round, from the newest state to the end of the job. Raises RoundEnded, BrokenGroup, UserError."""

    def group_of(self, this_round: Round) -> AbstractContextManager[AbortableProcessGroup | None]:
        """The process group of a round; None for a rank that is alone."""
        return process_group(
            self._config,
            control=self._control,
            member=self._member,
            this_round=this_round,
            rank=this_round.place(self._process.rank),
            size=this_round.size(self._config.world_size),
            backend=self._backend,
            traffic=self._traffic,
            transport=self._transport,
        )

    def new_loop(self, model: Trained, *, counts: bool = True) -> TrainingLoop:
        """The loop of this rank. counts: see TrainingLoop."""
        control = self._control
        return TrainingLoop(
            self._task,
            model,
            name=self._process.name,
            metrics=self._metrics,
            send=lambda fields: control.send(MessageType.REPORT, **fields),
            late=self._task.device.type == "cuda",
            counts=counts,
        )

    def run(self) -> None:
        """Trains until the master says that the job is done. Raises TrainerError, or what the user's code raises."""
        try:
            self._run()
        finally:
            if self.saves is not None:
                self.saves.wait()

    def _run(self) -> None:
        self.resume()
        while True:
            if self._member.rolled_back:
                self._go_back()
            self._member.get_ready(self._control)
            this_round = self._member.await_round(self._control, timeout=self._config.startup_timeout_seconds)
            if this_round is None:
                return
            self._task.schedule.without_parts = frozenset(self._member.course.left_out)
            try:
                if self._member.round is not this_round:
                    raise RoundEnded
                self.take_part_in(this_round)
                return
            except RolledBack:
                continue
            except RoundResized:
                log.info("round %d is over at step %d: workers join or leave", this_round.number, self._member.step)
                continue
            except RoundEnded:
                why = "the loss is not finite" if self._member.rolled_back else "a worker was lost"
                log.info("round %d is over: %s", this_round.number, why)
            except BrokenGroup as error:
                log.warning("round %d ended: %s", this_round.number, error)
                self._require_a_lost_peer(this_round, error)
            self._metrics.recoveries += 1

    def train(self, loop: TrainingLoop, exchange: Exchange, this_round: Round, *, together: bool) -> None:
        """Runs the loop to its end. together: with other ranks, whose loss the model's own collectives may raise as their own error."""
        try:
            with user_code.refusing_groups("trainer.model"):
                loop.run(exchange)
        except NonFinite as error:
            self._go_back_or_fail(error, this_round)
        except RuntimeError as error:
            if together and self.has_ended(this_round):
                raise BrokenGroup(error) from None
            raise

    def _go_back_or_fail(self, error: NonFinite, this_round: Round) -> NoReturn:
        """The training is not finite: raises RolledBack when the master has ended the round for it, else the error."""
        member, parts = self._member, self._config.parts_per_step
        goes_back = member.course.may_roll_back(
            self._config
        )  # as the master decides it: both know the course of this round
        step = self.failing_step(error)
        left_out = list(range(step * parts, (step + 1) * parts))
        said: Message = {"step": step, "generation": this_round.number, "parts": left_out}
        if goes_back:
            with self._control.changed:
                member.nan = said
        self._control.send(MessageType.NAN, **said)
        if not goes_back:
            raise error
        log.warning("%s; the training goes back to the newest checkpoint", error)
        self._control.wait(
            lambda: True if member.round is not this_round else None,
            what="the roll-back",
            timeout=self._config.startup_timeout_seconds,
        )
        raise RolledBack from None

    def failing_step(self, error: NonFinite) -> int:
        """The step whose gradient, or loss, is not finite."""
        return error.step

    def _go_back(self) -> None:
        """What this rank holds does not count any more."""
        member = self._member
        with self._control.changed:
            member.rolled_back, known = False, member.course
        self.go_back()
        member.course = member.course.merged(known)
        if self.saves is not None and self._process.rank == 0:
            self.saves.keep_left_out(member.course)

    def agree(self, stop: bool) -> bool:
        """Whether any rank of the round says so. Every rank must call it. Raises BrokenGroup."""
        if not dist.is_initialized():
            return stop
        flag = torch.tensor([float(stop)], device=self._task.device)
        try:
            dist.all_reduce(flag)
        except RuntimeError as error:
            raise BrokenGroup(error) from None
        return bool(flag.item())

    def has_ended(self, this_round: Round) -> bool:
        """Whether the master ended the round, which it may do a moment after a peer's loss was seen here."""
        with self._control.changed:
            return self._control.changed.wait_for(
                lambda: self._member.round is not this_round, PEER_LOSS_NOTICE_SECONDS
            )

    def over(self, this_round: Round) -> Callable[[float], bool]:
        """Waits so long between two tries of a last file; whether the round is over."""
        return lambda seconds: over(self._member, self._control, self.saves, this_round, seconds)

    def await_the_others(self, this_round: Round) -> None:
        """All work is done here. Raises RoundEnded when a peer is lost before it is done everywhere."""
        self._member.get_done(self._control)
        if not self._member.await_end(self._control, this_round):
            raise RoundEnded

    def _require_a_lost_peer(self, this_round: Round, error: BrokenGroup) -> None:
        """Raises UserError when MAX_BREAKS rounds in a row break at one step in the same way, and the master knows of no lost peer."""
        if self.has_ended(this_round):
            self._breaks = ((0, ""), 0)
            return
        how = (self._member.step, re.sub(r"\d+", "#", str(error)))  # ports differ
        count = self._breaks[1] + 1 if how == self._breaks[0] else 1
        self._breaks = (how, count)
        if count == MAX_BREAKS:
            raise UserError(
                f"the connections between the workers broke {count} times in a row at step {self._member.step} while no worker was lost: "
                f"{error}"
            )

    def _count(self) -> None:
        """The bytes up to now, for a scrape."""
        self._metrics.bytes_sent, self._metrics.bytes_received = self._traffic.sent, self._traffic.received
