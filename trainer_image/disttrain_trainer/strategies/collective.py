"""The role of a DataParallel worker: a rank from its start to its end, through lost peers.

The survivors keep their state, and the rank with the newest state gives it to all. What a rank does in a step is all_reduce.py.
"""

import os
import re
from functools import partial

import torch

from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import by_name, final, model_file, origin, store, tensors
from disttrain_trainer.errors import PeerLost, UserError, WrongInput
from disttrain_trainer.loop.loop import Loop
from disttrain_trainer.loop.meter import NonFiniteLoss
from disttrain_trainer.model import task as tasks
from disttrain_trainer.model import user_code
from disttrain_trainer.model.flat import FlatModel
from disttrain_trainer.model.optimizers import FlatOptimizer
from disttrain_trainer.net import transport
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.parallel.process_group import process_group
from disttrain_trainer.parallel.replicate import Replicated
from disttrain_trainer.parallel.shared_buffers import SharedBuffers
from disttrain_trainer.parallel.state import RankState
from disttrain_trainer.parallel.traffic import Traffic
from disttrain_trainer.runtime import logs, machine
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.runtime.sockets import split_address
from disttrain_trainer.strategies.all_reduce import AllReduce, RoundEnded, needs_all_ranks
from disttrain_trainer.strategies.rank_checkpoints import RankCheckpoints

log = logs.get_logger(__name__)

PEER_LOSS_NOTICE_SECONDS = 3.0
"""Seconds within which the master reports the loss of a peer that broke a step."""
MAX_BREAKS = 3
"""Rounds in a row that may break at one step in the same way while no peer is lost."""


class CollectiveWorker:
    """One rank of the job."""

    def __init__(self, *, process: Process, metrics: Metrics, control: ControlClient, member: CollectiveMember) -> None:
        self._process = process
        self._config: JobConfig = process.config
        self._metrics = metrics
        self._control = control
        self._member = member
        self._task = task = tasks.build(
            self._config, rank=process.rank, local_rank=process.machine_rank, incarnation=process.incarnation
        )
        self._flat = FlatModel(task.model)
        self._optimizer = FlatOptimizer(self._config.trainer.loop.optimizer, self._flat)
        self._state = RankState(task.model, self._optimizer, self._flat.described())
        if self._config.world_size > 1 or self._config.checkpoint is not None:
            self._state.check()
        self._model_dir = model_file.place_of(task.model, process.model_dir) if process.rank == 0 else None
        if needs_all_ranks(task.model) and self._config.parts_per_step != self._config.world_size:
            raise WrongInput(
                "trainer.model: SyncBatchNorm takes its mean over all ranks at once, so that each must compute one part of a step; here "
                f"trainer.partsPerStep is {self._config.parts_per_step}, and the job has {self._config.world_size} worker processes: make "
                "them equal, or use BatchNorm"
            )
        self._breaks: tuple[tuple[int, str], int] = ((0, ""), 0)
        """The step and the error at which a round broke although no peer was lost, and how many did so in a row."""
        with control.changed:
            member.data, member.layout = task.data, self._state.layout
        self._checkpoints = (
            RankCheckpoints(
                config=self._config,
                root=process.checkpoint_dir,
                keep=self._config.checkpoint.keep,
                metrics=metrics,
                control=control,
                member=member,
                model=self._flat,
                state=self._state,
                data=task.data,
            )
            if process.rank == 0 and process.checkpoint_dir is not None and self._config.checkpoint is not None
            else None
        )
        self._loop = Loop(
            task,
            self._flat,
            name=process.name,
            metrics=metrics,
            send=lambda fields: control.send(MessageType.REPORT, **fields),
            late=task.device.type == "cuda",
        )
        self._traffic = Traffic()
        self._transport = transport.of(self._config, process.tls_dir)
        metrics.before_scrape = self._count

    def run(self) -> None:
        """Trains until the master says that the job is done. Raises TrainerError, or what the user's code raises."""
        try:
            self._run()
        finally:
            if self._checkpoints is not None:
                self._checkpoints.wait()

    def _run(self) -> None:
        self._resume()
        while True:
            self._member.get_ready(self._control)
            this_round = self._member.await_round(self._control, timeout=self._config.startup_timeout_seconds)
            if this_round is None:
                return
            try:
                self._take_part_in(this_round)
                return
            except RoundEnded:
                log.info("round %d is over: a worker was lost", this_round.number)
            except BrokenGroup as error:
                log.warning("round %d ended: %s", this_round.number, error)
                self._require_a_lost_peer(this_round, error)
            self._metrics.recoveries += 1

    def _take_part_in(self, this_round: Round) -> None:
        """One round: take over the newest state, train to the end, wait for the others."""
        member, process = self._member, self._process
        backend = tasks.choose_backend(self._config, self._task.device)
        if self._checkpoints is not None:
            self._checkpoints.forget_last()
        if backend == "nccl":
            self._metrics.left_out |= {"disttrain_communication_bytes"}  # NCCL reports no bytes
        with process_group(
            self._config,
            control=self._control,
            member=member,
            this_round=this_round,
            index=process.rank,
            backend=backend,
            traffic=self._traffic,
            transport=self._transport,
        ) as group:
            replica = None
            if group is not None:
                take_newest(member, this_round, state=self._state, own=process.rank, device=self._task.device)
                replica = Replicated(
                    self._flat,
                    group=group,
                    buffers=self._shared_buffers(),
                    search=self._config.trainer.find_unused_parameters,
                )
            log.info("round %d begins at step %d", this_round.number, member.step)
            exchange = AllReduce(
                process=process,
                metrics=self._metrics,
                control=self._control,
                member=member,
                this_round=this_round,
                loop=self._loop,
                task=self._task,
                model=self._flat,
                optimizer=self._optimizer,
                replica=replica,
                reshare=self._reshare,
                checkpoints=self._checkpoints,
            )
            try:
                with user_code.refusing_groups("trainer.model"):
                    self._loop.run(exchange)
            except NonFiniteLoss as error:
                self._control.send(MessageType.NAN, step=error.step)
                raise
            except RuntimeError as error:
                if replica is not None and self._round_ended(this_round):
                    raise BrokenGroup(error) from None
                raise
            finally:
                if replica is not None:
                    replica.close()
        self._end(this_round)

    def _require_a_lost_peer(self, this_round: Round, error: BrokenGroup) -> None:
        """Raises UserError when MAX_BREAKS rounds in a row break at one step in the same way, and the master knows of no lost peer."""
        if self._round_ended(this_round):
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

    def _shared_buffers(self) -> SharedBuffers | None:
        model = self._task.model
        return SharedBuffers(model, self._task.device) if tensors.may_have_buffers(model) else None

    def _reshare(self) -> SharedBuffers | None:
        """After a step in which a buffer has grown, or came or went: every rank takes the whole state of rank 0."""
        self._state.broadcast(source=0, step=self._member.step, device=self._task.device)
        return self._shared_buffers()

    def _count(self) -> None:
        """The bytes up to now, for a scrape."""
        self._metrics.bytes_sent, self._metrics.bytes_received = self._traffic.sent, self._traffic.received

    def _round_ended(self, this_round: Round) -> bool:
        """Whether the master ended the round. A model with collectives of its own (SyncBatchNorm) raises the loss of a peer as its own
        error."""
        with self._control.changed:
            return self._control.changed.wait_for(
                lambda: self._member.round is not this_round, PEER_LOSS_NOTICE_SECONDS
            )

    def _end(self, this_round: Round) -> None:
        """The last step is done: save, evaluate, and wait until every rank is done. A lost peer leads to another round."""
        member, checkpoints, over = self._member, self._checkpoints, partial(self._over, this_round)
        if self._process.rank == 0:
            unsaved = checkpoints is not None and not checkpoints.complete
            evaluates = self._task.evaluate is not None and member.evaluation is None
            model_dir = self._model_dir if member.model is None else None
            if checkpoints is not None and unsaved and (evaluates or model_dir is not None):
                checkpoints.save_last()  # an evaluation that fails, or a full volume, must not cost the training
            if model_dir is not None:  # before the evaluation, which may change the model
                member.model = model_file.insist(self._task.model, model_dir, step=member.step, over=over)
                if member.model is None:
                    raise RoundEnded
            if self._task.evaluate is not None and evaluates:
                member.evaluation = self._task.evaluate()
            if (
                checkpoints is not None
                and unsaved
                and not final.insist("last checkpoint", member.step, checkpoints.finish, over=over)
            ):
                raise RoundEnded
        member.get_done(self._control)
        if not member.await_end(self._control, this_round):
            raise RoundEnded

    def _over(self, this_round: Round, seconds: float) -> bool:
        """Waits so long between two tries of a last file; whether the round is over."""
        member, control = self._member, self._control
        with control.changed:
            control.changed.wait_for(lambda: member.save_asked or member.round is not this_round, seconds)
        control.check()
        if member.save_asked and self._checkpoints is not None:
            self._checkpoints.save_last()
        return member.round is not this_round

    def _resume(self) -> None:
        """Rank 0 loads the newest checkpoint, or the model that the job starts with; the other ranks get its state from rank 0, or a newer
        one from another rank."""
        root = self._process.checkpoint_dir
        self._member.step = 0
        if self._process.rank != 0:
            return
        if root is None:
            log.info("there is no checkpoint volume: if all workers are lost, the training starts again at step 0")
            return
        found = origin.look(root, self._config, self._task.data)
        newest = found.checkpoint
        if self._checkpoints is not None:
            self._checkpoints.resumed = found.describe(self._config)
        if newest is None and found.start is not None:
            by_name.load_model(found.start.folder, self._task.model, source=found.start.of)
        if newest is not None:
            file = newest.manifest.file_of(store.STATE)
            if file is not None:
                self._state.load(newest.folder / file)
            else:
                self._state.load_by_name(newest.folder)
            self._member.step = newest.manifest.step
            self._metrics.checkpoint_step = newest.manifest.step


def take_newest(
    member: CollectiveMember, this_round: Round, *, state: RankState, own: int, device: torch.device
) -> None:
    """Takes over the state of the round's source. A rank that fails half-way holds the state of no step, and must not become a source.

    own: this rank's number. Raises PeerLost when the source has no state.
    """
    held = member.step
    if this_round.source != own:
        member.step = -1
    member.step = state.broadcast(source=this_round.source, step=held, device=device)
    if member.step < 0:
        raise PeerLost(f"worker-{this_round.source}", "it has no whole state to give")


def run(process: Process, metrics: Metrics, control: ControlClient, member: CollectiveMember) -> None:
    """The role of a DataParallel worker."""
    machine.set_interface(os.environ, toward=split_address(process.config.addresses.rendezvous)[0])
    CollectiveWorker(process=process, metrics=metrics, control=control, member=member).run()
