"""A rank of a training with collectives from its start to its end: round after round, through lost peers.

What it holds and what it does in a round is the strategy's: collective.py for whole models, sharded.py for parts of one.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from disttrain.api.runtime import JobConfig
from disttrain_trainer.errors import UserError
from disttrain_trainer.loop.exchange import Exchange
from disttrain_trainer.loop.loop import TrainingLoop
from disttrain_trainer.loop.meter import NonFiniteLoss
from disttrain_trainer.loop.trained import Trained
from disttrain_trainer.model import task as tasks
from disttrain_trainer.model import user_code
from disttrain_trainer.net import copies, transport
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.parallel.process_group import AbortableProcessGroup, process_group
from disttrain_trainer.parallel.traffic import Traffic
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process

log = logs.get_logger(__name__)

PEER_LOSS_NOTICE_SECONDS = 3.0
"""Seconds within which the master reports the loss of a peer that broke a step."""
MAX_BREAKS = 3
"""Rounds in a row that may break at one step in the same way while no peer is lost."""


class RoundEnded(Exception):
    """The master ended the round."""


class RoundResized(RoundEnded):
    """The round ended after a whole step: members of an elastic job join or leave."""


class Saves(Protocol):
    """The checkpoints that a rank writes."""

    def wait(self) -> None:
        """Blocks until nothing is being written."""

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
            self._member.get_ready(self._control)
            this_round = self._member.await_round(self._control, timeout=self._config.startup_timeout_seconds)
            if this_round is None:
                return
            try:
                self.take_part_in(this_round)
                return
            except RoundResized:
                log.info("round %d is over at step %d: workers join or leave", this_round.number, self._member.step)
                continue
            except RoundEnded:
                log.info("round %d is over: a worker was lost", this_round.number)
            except BrokenGroup as error:
                log.warning("round %d ended: %s", this_round.number, error)
                self._require_a_lost_peer(this_round, error)
            self._metrics.recoveries += 1

    def train(self, loop: TrainingLoop, exchange: Exchange, this_round: Round, *, together: bool) -> None:
        """Runs the loop to its end. together: with other ranks, whose loss the model's own collectives may raise as their own error."""
        try:
            with user_code.refusing_groups("trainer.model"):
                loop.run(exchange)
        except NonFiniteLoss as error:
            self._control.send(MessageType.NAN, step=error.step)
            raise
        except RuntimeError as error:
            if together and self.has_ended(this_round):
                raise BrokenGroup(error) from None
            raise

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
