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
from disttrain_trainer.data.inner_batches import Portions
from disttrain_trainer.errors import PeerLost
from disttrain_trainer.loop.loop import TrainingLoop
from disttrain_trainer.loop.meter import NonFiniteLoss
from disttrain_trainer.model import forward_options, user_code
from disttrain_trainer.model import task as tasks
from disttrain_trainer.model.parameter_groups import groups_of
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
from disttrain_trainer.strategies import first_evaluation
from disttrain_trainer.strategies.accumulation import Accumulation
from disttrain_trainer.strategies.hedging import Hedging
from disttrain_trainer.strategies.kept_gradient import KeptGradient
from disttrain_trainer.strategies.local_steps import LocalSteps
from disttrain_trainer.strategies.push_pull import PushPull
from disttrain_trainer.strategies.served_evaluation import ServedEvaluation
from disttrain_trainer.strategies.served_rounds import ServedRounds

log = logs.get_logger(__name__)


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
            first_evaluation.attempt(self._task, process)
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
        portions = Portions(self._config)
        self._accumulation = Accumulation(self._replica.model, portions) if portions.count > 1 else None
        exchange = process.config.strategy.exchange
        assert isinstance(exchange, ParameterServerStrategy)
        self._compression = compression.of(exchange.compression, self._replica.staging.parameters)
        self._evaluation = self._between_steps()
        self._assignments = Assignments(control, member)
        self._rounds = ServedRounds(control, member, timeout=self._config.startup_timeout_seconds)
        self._kept = KeptGradient()
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
            member.ahead = self._task.loading.ahead if self._task.loading is not None else 0
        while not control.finished:
            member.get_ready(control)
            this_round = member.await_round(control, timeout=self._config.startup_timeout_seconds)
            if this_round is not None:
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
            clock=self._rounds.clock if this_round.number == self._replica.round_number else 0,
            primaries=this_round.primaries,
            compression=self._compression,
            total_steps=self._task.schedule.total_steps,
            groups=groups_of(self._config.trainer.loop.optimizer, self._replica.model.places),
            transport=self._transport,
        )
        with self._control.changed:
            if self._member.round is not this_round:
                return
            self._member.client = client
        self._assignments.begin(this_round)
        self._task.schedule.without_parts = frozenset(self._member.course.left_out)
        if this_round.number != self._replica.round_number:
            self._forget_lost_steps()
        hedging = self._hedging_with(client)
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
            clips=self._config.trainer.max_gradient_norm is not None,
            every=self._config.checkpoint.every_steps if self._config.checkpoint else 0,
            save=lambda: self._save_buffers(client),
            evaluate=lambda: self._evaluate(client, this_round),
            on_part=self._rounds.note_part,
            hedging=hedging,
            local=self._local,
            accumulation=self._accumulation,
            loading=self._task.loading,
            evaluation=self._evaluation,
            kept=None if hedging else self._kept,
        )
        try:
            client.connect(self._replica.model.layout)
            self._replica.begin(client, this_round)
            log.info("round %d begins with %d servers", this_round.number, self._config.parameter_servers)
            with user_code.refusing_groups("trainer.model"):
                self._loop.run(exchange)
        except NonFiniteLoss as error:
            self._go_back_or_fail(error, this_round)
        except PeerLost as error:
            self._metrics.recoveries += 1
            self._rounds.broke(this_round, error)
        finally:
            with self._control.changed:
                self._member.client = None
                self._rounds.left(client)
            client.close()

    def _go_back_or_fail(self, error: NonFiniteLoss, this_round: Round) -> None:
        """The loss is not finite: waits for the round that begins from the newest checkpoint, or raises the error."""
        member, each = self._member, self._config.parts_per_step
        goes_back = member.course.may_roll_back(self._config)
        step, parts = error.step, [] if error.part is None else [error.part]
        if self._is_sync:
            began = self._replica.model.is_finite() if self._local is None else self._local.began_finite
            if not began:  # the gradient of the step before was not
                step = max(0, step - 1)
            parts = list(range(step * each, (step + 1) * each))
        self._control.send(MessageType.NAN, step=step, stay=this_round.lease, parts=parts)
        if not goes_back:
            raise error
        log.warning("%s; the training goes back to the newest checkpoint", error)
        self._control.wait(
            lambda: True if member.round is not this_round else None,
            what="the roll-back",
            timeout=self._config.startup_timeout_seconds,
        )

    def _forget_lost_steps(self) -> None:
        """Another round begins from a checkpoint: what this worker keeps beside the model is of steps after that."""
        if self._compression is not None:
            self._compression.reset()
        if self._local is not None:
            self._local.reset()
        if self._evaluation is not None:
            self._evaluation.forget()

    def _between_steps(self) -> ServedEvaluation | None:
        if self._task.evaluate is None or not self._config.trainer.evaluate_every_steps:
            return None
        return ServedEvaluation(
            config=self._config,
            control=self._control,
            member=self._member,
            task=self._task,
            replica=self._replica,
            evaluator=self._task.evaluate,
        )

    def _local_steps(self) -> LocalSteps | None:
        exchange, trainer = self._config.strategy.exchange, self._config.trainer
        if not (isinstance(exchange, ParameterServerStrategy) and exchange.local_steps > 1):
            return None
        full = trainer.batch_size // self._config.parts_per_step
        return LocalSteps(
            self._replica.model,
            trainer.loop.optimizer,
            steps=exchange.local_steps,
            full=full,
            clip=trainer.max_gradient_norm,
            learning_rate=self._task.learning_rate,
        )

    def _hedging_with(self, client: ShardedClient) -> Hedging | None:
        exchange = self._config.strategy.exchange
        if not (isinstance(exchange, ParameterServerStrategy) and exchange.backup_workers):
            return None
        return Hedging(control=self._control, assignments=self._assignments, client=client, replica=self._replica)

    def _count(self) -> None:
        self._metrics.bytes_sent, self._metrics.bytes_received = self._rounds.bytes_moved()

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
        step = self._member.last_step or self._task.schedule.total_steps
        client.join()
        self._replica.pull(client, step)
        self._replica.take_buffers(client, client.versions[0])
        client.leave()
        found: dict[str, object] = {}
        if (folder := self._model_dir) is not None:
            over = partial(self._rounds.over, this_round)
            written = model_file.insist(
                lambda: model_file.write(model_file.state_of(self._task.model), folder), step=step, over=over
            )
            if written is None:
                return
            found["model"] = written.to_dict()
        course = self._member.course
        if course.evaluated == step and course.evaluation is not None:
            found["evaluation"] = course.evaluation  # the training has ended at an evaluation
        elif self._task.evaluate is not None:
            found["evaluation"] = numbers = self._task.evaluate(self._task.model)
            if self._task.hooks is not None:
                self._task.hooks.evaluated(numbers)
        self._control.send(MessageType.EVALUATED, stay=this_round.lease, **found)


def run(process: Process, metrics: Metrics, control: ControlClient, member: ParameterServerMember) -> None:
    """The role of a worker of parameter servers."""
    Worker(process=process, metrics=metrics, control=control, member=member).run()
