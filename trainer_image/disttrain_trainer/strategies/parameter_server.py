"""The role of a worker of parameter servers: rounds with the servers, the model's files, and the evaluation.

When a peer is lost, the worker leaves the round and asks for the next one; the servers know which parts count. What a worker does in a
round is push_pull.py.
"""

import time
from collections.abc import Callable
from functools import partial

from disttrain.api.strategy import ParameterServerStrategy
from disttrain_trainer.checkpoint import model_file
from disttrain_trainer.checkpoint.background import BackgroundWriter
from disttrain_trainer.checkpoint.store import step_of
from disttrain_trainer.errors import PeerLost
from disttrain_trainer.loop.loop import TrainingLoop
from disttrain_trainer.loop.meter import NonFiniteLoss
from disttrain_trainer.model import forward_options, user_code
from disttrain_trainer.model import task as tasks
from disttrain_trainer.model.task import Task
from disttrain_trainer.net import copies, transport
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import ParameterServerMember, Round
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.parameter_server import compression
from disttrain_trainer.parameter_server.assignments import Assignments
from disttrain_trainer.parameter_server.client import ShardedClient
from disttrain_trainer.parameter_server.replica import Replica
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.strategies.hedging import Hedging
from disttrain_trainer.strategies.local_steps import LocalSteps
from disttrain_trainer.strategies.push_pull import PushPull

log = logs.get_logger(__name__)

RETRY_SECONDS = 0.2
"""Seconds before a worker asks for another round when one broke and the master did not end it."""


class Worker:
    """One worker of the job."""

    def __init__(
        self,
        *,
        process: Process,
        metrics: Metrics,
        control: ControlClient,
        member: ParameterServerMember,
        task: Task | None = None,
        make_loop: Callable[..., TrainingLoop] = TrainingLoop,
    ) -> None:
        """task: default: made by the job's factories. make_loop: takes what TrainingLoop takes."""
        self._process = process
        self._config = process.config
        self._metrics = metrics
        self._control = control
        self._member = member
        self._is_sync = process.config.strategy.synchronous
        self._transport = transport.of(self._config, process.tls_dir)
        with copies.kept(process, self._transport):
            self._task = task or tasks.build(
                self._config, rank=process.rank, local_rank=process.machine_rank, incarnation=process.incarnation
            )
        forward_options.apply(self._task.model, self._config.trainer)
        self._replica = Replica(process, self._task, is_sync=self._is_sync)
        self._writer = BackgroundWriter()
        control.before_release = self._writer.wait
        self._model_dir = model_file.place_of(self._task.model, process.model_dir)
        self._loop = make_loop(
            self._task,
            self._replica.model,
            name=process.name,
            metrics=metrics,
            send=lambda fields: control.send(MessageType.REPORT, **fields),
        )
        self._local = self._local_steps()
        exchange = process.config.strategy.exchange
        assert isinstance(exchange, ParameterServerStrategy)
        self._compression = compression.of(exchange.compression, self._replica.staging.parameters)
        self._assignments = Assignments(control, member)
        self._clock = 0
        """Iterations completed in the newest round."""
        self._moved = time.monotonic()
        """When a part was last done."""
        self._moved_bytes = (0, 0)
        """Sent and received by connections that are closed."""
        metrics.before_scrape = self._count

    def run(self) -> None:
        """Works until the master says that the job is done. Raises TrainerError, or what the user's code raises."""
        try:
            self._run()
        finally:
            self._writer.wait()  # without these buffers the servers' shards of a step make no checkpoint

    def _run(self) -> None:
        control, member = self._control, self._member
        with control.changed:
            member.data = self._task.data
            member.buffers = self._process.checkpoint_dir is not None
            member.keeps_model = self._model_dir is not None
        while not control.finished:
            if member.round is None:
                control.send(MessageType.READY, **member.describe())
            this_round = control.wait(
                lambda: "finished" if control.finished else member.round,
                what="the parameter servers and the master",
                timeout=self._config.startup_timeout_seconds,
            )
            if isinstance(this_round, Round):
                self._take_part_in(this_round)

    def _take_part_in(self, this_round: Round) -> None:
        """Works with the servers until the round is over."""
        client = ShardedClient(
            addresses=self._config.addresses.parameter_servers,
            config=self._config,
            rank=self._process.rank,
            incarnation=self._process.incarnation,
            round_number=this_round.number,
            timeout=self._config.peer_timeout_seconds,
            clock=self._clock if this_round.number == self._replica.round_number else 0,
            primaries=this_round.primaries,
            compression=self._compression,
            transport=self._transport,
        )
        with self._control.changed:
            if self._member.round is not this_round:
                return
            self._member.client = client
        self._assignments.begin(this_round)
        if this_round.number != self._replica.round_number:
            self._forget_lost_steps()
        exchange = PushPull(
            control=self._control,
            member=self._member,
            metrics=self._metrics,
            assignments=self._assignments,
            client=client,
            loop=self._loop,
            schedule=self._task.schedule,
            replica=self._replica,
            is_sync=self._is_sync,
            every=self._config.checkpoint.every_steps if self._config.checkpoint else 0,
            save=lambda: self._save_buffers(client),
            evaluate=lambda: self._evaluate(client, this_round),
            on_part=self._note_part,
            hedging=self._hedging_with(client),
            local=self._local,
        )
        try:
            client.connect(self._replica.model.layout)
            self._replica.begin(client, this_round)
            log.info("round %d begins with %d servers", this_round.number, self._config.parameter_servers)
            with user_code.refusing_groups("trainer.model"):
                self._loop.run(exchange)
        except NonFiniteLoss as error:
            self._control.send(MessageType.NAN, step=error.step)
            raise
        except PeerLost as error:
            self._round_broke(this_round, error)
        finally:
            with self._control.changed:
                self._member.client = None
                self._clock = client.clock
                sent, received = self._moved_bytes
                self._moved_bytes = (sent + client.bytes_sent, received + client.bytes_received)
            client.close()

    def _forget_lost_steps(self) -> None:
        """Another round begins from a checkpoint: what this worker keeps beside the model is of steps after that."""
        if self._compression is not None:
            self._compression.reset()
        if self._local is not None:
            self._local.reset()

    def _local_steps(self) -> LocalSteps | None:
        exchange, trainer = self._config.strategy.exchange, self._config.trainer
        if not (isinstance(exchange, ParameterServerStrategy) and exchange.local_steps > 1):
            return None
        full = trainer.batch_size // self._config.parts_per_step
        return LocalSteps(self._replica.model, trainer.loop.optimizer, steps=exchange.local_steps, full=full)

    def _hedging_with(self, client: ShardedClient) -> Hedging | None:
        exchange = self._config.strategy.exchange
        if not (isinstance(exchange, ParameterServerStrategy) and exchange.backup_workers):
            return None
        return Hedging(control=self._control, assignments=self._assignments, client=client, replica=self._replica)

    def _note_part(self) -> None:
        self._moved = time.monotonic()

    def _count(self) -> None:
        with self._control.changed:  # a client's bytes are in one of the two, never in both
            client = self._member.client
            sent, received = self._moved_bytes
            if client is not None:
                sent, received = sent + client.bytes_sent, received + client.bytes_received
        self._metrics.bytes_sent, self._metrics.bytes_received = sent, received

    def _round_broke(self, this_round: Round, error: PeerLost) -> None:
        """A server is lost, or the master ended the round: waits for the next round. Raises when no part was done for too long."""
        control, member = self._control, self._member
        self._metrics.recoveries += 1
        with control.changed:
            if member.round is not this_round:
                return
            log.warning("%s", error)
            if time.monotonic() - self._moved > self._config.startup_timeout_seconds:
                raise error
            control.changed.wait_for(lambda: member.round is not this_round, RETRY_SECONDS)
            if member.round is this_round:
                member.round = None

    def _save_buffers(self, client: ShardedClient) -> None:
        with self._control.changed:
            save, self._member.save = self._member.save, None
        if save is None:
            return
        if not self._replica.take_buffers(client, step_of(save.folder)):
            log.warning("%s has the buffers of a later step", save.folder)
        self._writer.wait()
        self._writer.check()
        began = time.perf_counter()
        write = self._replica.saved_buffers.save(save.folder)
        self._control.send(MessageType.COPIED, id=save.id)
        self._writer.start(lambda: self._control.send(MessageType.SAVED, id=save.id, **write()))
        self._metrics.phase_seconds["checkpoint"] += time.perf_counter() - began

    def _evaluate(self, client: ShardedClient, this_round: Round) -> None:
        """All parts are applied: sends the master the result of the user's `evaluate` on the final parameters, and their file.

        The file is written first: an evaluation that fails, or that changes the model, must not cost the training.
        """
        client.join()
        self._replica.pull(client, self._task.schedule.total_steps)
        self._replica.take_buffers(client, client.versions[0])
        client.leave()
        found: dict[str, object] = {}
        if (folder := self._model_dir) is not None:
            step, over = self._task.schedule.total_steps, partial(self._over, this_round)
            written = model_file.insist(
                lambda: model_file.write(model_file.state_of(self._task.model), folder), step=step, over=over
            )
            if written is None:
                return
            found["model"] = written.to_dict()
        if self._task.evaluate is not None:
            found["evaluation"] = self._task.evaluate(self._task.model)
        self._control.send(MessageType.EVALUATED, stay=this_round.lease, **found)

    def _over(self, this_round: Round, seconds: float) -> bool:
        """Waits so long between two tries of the model's file; whether the round is over."""
        control, member = self._control, self._member
        with control.changed:
            control.changed.wait_for(lambda: member.round is not this_round, seconds)
        control.check()
        return member.round is not this_round


def run(process: Process, metrics: Metrics, control: ControlClient, member: ParameterServerMember) -> None:
    """The role of a worker of parameter servers."""
    Worker(process=process, metrics=metrics, control=control, member=member).run()
