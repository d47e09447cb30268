"""The role of a DataParallel worker: a rank from its start to its end, through lost peers.

The survivors keep their state, and the rank with the newest state gives it to all. What a rank does in a step is all_reduce.py.
"""

import os

import torch
from torch import nn

from disttrain.api import environment
from disttrain_trainer.checkpoint import by_name, final, model_file, origin, retention, store, tensors
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.checkpoint.measured import Measured
from disttrain_trainer.errors import PeerLost, WrongInput
from disttrain_trainer.loop.meter import NonFinite, NonFiniteLoss
from disttrain_trainer.model import forward_options
from disttrain_trainer.model.factory_optimizer import FactoryOptimizer
from disttrain_trainer.model.flat import FlatModel
from disttrain_trainer.model.initial import InitialParameters, sums_of_bits
from disttrain_trainer.model.optimizers import FlatOptimizer
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.parallel.replicate import Replicated
from disttrain_trainer.parallel.shared_buffers import SharedBuffers
from disttrain_trainer.parallel.state import RankState
from disttrain_trainer.runtime import logs, machine
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.runtime.sockets import split_address
from disttrain_trainer.strategies.all_reduce import AllReduce, needs_all_ranks
from disttrain_trainer.strategies.evaluations import RankEvaluations, require_unchanged
from disttrain_trainer.strategies.rank import Rank, RoundEnded, RoundResized
from disttrain_trainer.strategies.rank_checkpoints import RankCheckpoints
from disttrain_trainer.strategies.streaming import Streaming

log = logs.get_logger(__name__)


class CollectiveWorker(Rank):
    """One rank of the job."""

    def __init__(self, *, process: Process, metrics: Metrics, control: ControlClient, member: CollectiveMember) -> None:
        super().__init__(process=process, metrics=metrics, control=control, member=member)
        task = self._task
        self._may_lead = process.rank == 0 or self._config.elastic
        """Whether this rank may be the one that saves, evaluates and writes the model: the first of a round."""
        self._leads = False
        self._fresh = True
        """The state is that of the factory or of the checkpoint: no other rank has given any."""
        self._has_gone_back = False
        """What this rank held does not count any more, and it has not loaded a checkpoint."""
        forward_options.apply(task.model, self._config.trainer)
        self._flat = FlatModel(task.model)
        self._first = (
            InitialParameters(self._config, self._flat.parameters, prepare=self._load_start)
            if self._may_lead and self._config.trainer.nan_policy is not None
            else None
        )
        self._optimizer = (
            FactoryOptimizer(
                task.make_optimizer,
                self._flat.named,
                scheduled=self._config.trainer.learning_rate_schedule is not None,
            )
            if task.make_optimizer is not None
            else FlatOptimizer(self._config.trainer.loop.optimizer, self._flat)
        )
        self._state = RankState(task.model, self._optimizer, self._flat.described())
        if self._config.world_size > 1 or self._config.checkpoint is not None:
            self._state.check()
        self._model_dir = model_file.place_of(task.model, process.model_dir) if self._may_lead else None
        if needs_all_ranks(task.model) and self._config.elastic:
            raise WrongInput(
                "trainer.model: SyncBatchNorm takes its mean over all ranks at once, and those of an elastic job change: leave "
                "worker.elastic out, or use BatchNorm"
            )
        if needs_all_ranks(task.model) and self._config.parts_per_step != self._config.world_size:
            raise WrongInput(
                "trainer.model: SyncBatchNorm takes its mean over all ranks at once, so that each must compute one part of a step; here "
                f"trainer.partsPerStep is {self._config.parts_per_step}, and the job has {self._config.world_size} worker processes: make "
                "them equal, or use BatchNorm"
            )
        self._streaming = None if task.stream is None else Streaming(task.stream, process, task.schedule)
        with control.changed:
            member.data, member.layout = task.data, self._state.layout
            member.repeats_data = task.stream is not None and not task.stream.stateful
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
            if self._may_lead and process.checkpoint_dir is not None and self._config.checkpoint is not None
            else None
        )
        self._loop = self.new_loop(self._flat)

    @property
    def saves(self) -> RankCheckpoints | None:
        """Those of a rank that may be the first of a round."""
        return self._checkpoints

    def take_part_in(self, this_round: Round) -> None:
        """One round: take over the newest state, train to the end, wait for the others."""
        member, process = self._member, self._process
        self._leads = this_round.place(process.rank) == 0
        if self._checkpoints is not None:
            self._checkpoints.forget_last()
        if this_round.source == process.rank and member.step < 0 and (self._fresh or self._has_gone_back):
            known = member.course
            self._begin_again()  # rank 0 is not there, and no other has a state
            member.course = member.course.merged(known)
            if self._has_gone_back and self._checkpoints is not None:
                self._checkpoints.keep_left_out(member.course)
        self._has_gone_back = False
        with self.group_of(this_round) as group:
            replica = None
            state = self._state if group is not None else None
            self._fresh = self._fresh and state is None
            take_newest(member, this_round, state=state, own=process.rank, device=self._task.device)
            if group is not None:
                replica = Replicated(
                    self._flat,
                    group=group,
                    buffers=self._shared_buffers(),
                    search=self._config.trainer.find_unused_parameters,
                )
            if self._streaming is not None:
                self._streaming.seek(member.step)
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
                checkpoints=self._checkpoints if self._leads else None,
                evaluations=self._evaluations(this_round),
                streaming=self._streaming,
            )
            try:
                self.train(self._loop, exchange, this_round, together=replica is not None)
            finally:
                if replica is not None:
                    replica.close()
        if exchange.ended and member.step < self._task.schedule.total_steps:
            raise RoundResized
        self._end(this_round)

    def _evaluations(self, this_round: Round) -> RankEvaluations | None:
        evaluator = self._task.evaluate
        if evaluator is None or not self._config.trainer.evaluate_every_steps:
            return None

        def measure(number: int, of: int) -> Measured:
            before = sums_of_bits(self._flat.parameters)
            measured = evaluator.measure(self._task.model, number=number, of=of)
            require_unchanged(before, sums_of_bits(self._flat.parameters))
            return measured

        return RankEvaluations(
            process=self._process,
            task=self._task,
            loop=self._loop,
            control=self._control,
            member=self._member,
            this_round=this_round,
            measure=measure,
            agree=self.agree,
            kept=self._checkpoints.keep_course if self._leads and self._checkpoints is not None else None,
        )

    def _shared_buffers(self) -> SharedBuffers | None:
        model = self._task.model
        return SharedBuffers(model, self._task.device) if tensors.may_have_buffers(model) else None

    def _reshare(self) -> SharedBuffers | None:
        """After a step in which a buffer has grown, or came or went: every rank takes the whole state of rank 0."""
        self._state.broadcast(source=0, step=self._member.step, device=self._task.device)
        return self._shared_buffers()

    def _end(self, this_round: Round) -> None:
        """The last step is done: save, evaluate, and wait until every rank is done. A lost peer leads to another round."""
        member, checkpoints, over = self._member, self._checkpoints, self.over(this_round)
        if self._leads:
            if member.course.evaluated == member.step:
                member.evaluation = member.course.evaluation
            unsaved = checkpoints is not None and not checkpoints.complete
            evaluates = self._task.evaluate is not None and member.evaluation is None
            model_dir = self._model_dir if member.model is None else None
            if checkpoints is not None and unsaved and (evaluates or model_dir is not None):
                checkpoints.save_last()  # an evaluation that fails, or a full volume, must not cost the training
            if model_dir is not None:  # before the evaluation, which may change the model
                member.model = model_file.insist(
                    lambda: model_file.write(model_file.state_of(self._task.model), model_dir),
                    step=member.step,
                    over=over,
                )
                if member.model is None:
                    raise RoundEnded
            if self._task.evaluate is not None and evaluates:
                member.evaluation = self._task.evaluate(self._task.model)
                if self._task.hooks is not None:
                    self._task.hooks.evaluated(member.evaluation)
            if (
                checkpoints is not None
                and unsaved
                and not final.insist("last checkpoint", member.step, checkpoints.finish, over=over)
            ):
                raise RoundEnded
        self.await_the_others(this_round)

    def resume(self) -> None:
        """Rank 0 loads the newest checkpoint, or the model that the job starts with; the other ranks get its state from rank 0, or a newer
        one from another rank."""
        if self._process.rank == 0:
            self._load()
        else:
            # Of an elastic job rank 0 may be away, and this state must not count then: it may be older than the checkpoint.
            self._member.step = -1 if self._config.elastic else 0

    def failing_step(self, error: NonFinite) -> int:
        """The step before it, where the parameters that the loss is of are not finite either."""
        if isinstance(error, NonFiniteLoss) and self._task.device.type == "cpu" and not self._flat.is_finite():
            return max(0, error.step - 1)
        return error.step

    def go_back(self) -> None:
        """Rank 0 loads the newest checkpoint, or makes the first parameters again. Of an elastic job it may be away: then the first of the
        next round does."""
        self._has_gone_back = True
        if self._checkpoints is not None:
            self._checkpoints.wait()
        if self._process.rank:
            self._member.step, self._member.course = -1, Course()
        else:
            self._begin_again()

    def _begin_again(self) -> None:
        """The state is that of the newest checkpoint, or the first one."""
        if not self._load() and self._has_gone_back:
            assert self._first is not None, "a job that goes back remembers how it began"
            self._state.begin_again(self._first.restore(self._flat.parameters))

    def _load(self) -> bool:
        """False where there is no checkpoint."""
        root = self._process.checkpoint_dir
        self._member.step, self._member.course = 0, Course()
        if root is None:
            log.info("there is no checkpoint volume: if all workers are lost, the training starts again at step 0")
            return False
        # Again: in an elastic job a worker of the attempt before may have written a checkpoint after this process began.
        retention.set_aside(root, self._process.roll_back, config=self._config)
        found = origin.look(root, self._config, self._task.data)
        newest = found.checkpoint
        if self._checkpoints is not None:
            self._checkpoints.resumed = found.describe(self._config)
        if newest is None and found.start is not None:
            self._load_start(self._task.model)
        if newest is not None:
            file = newest.manifest.file_of(store.STATE)
            if file is not None:
                self._state.load(newest.folder / file)
            else:
                self._state.load_by_name(newest.folder)
            self._member.step, self._member.course = newest.manifest.step, newest.manifest.course
            self._metrics.checkpoint_step = newest.manifest.step
        return newest is not None

    def _load_start(self, model: nn.Module) -> None:
        """The model that the job starts with."""
        root = self._process.checkpoint_dir
        start = origin.taken(root, self._config) if root is not None else None
        if start is not None:
            by_name.load_model(start.folder, model, source=start.of)


def take_newest(
    member: CollectiveMember, this_round: Round, *, state: RankState | None, own: int, device: torch.device
) -> None:
    """Takes over the state of the round's source. A rank that fails half-way holds the state of no step, and must not become a source.

    state: None for a rank that is alone. own: this rank's number. Raises PeerLost when the source has no state: a new process of it loads
    the checkpoint.
    """
    held = member.step
    if this_round.source != own:
        member.step = -1
    if state is not None:
        member.step = state.broadcast(source=this_round.place(this_round.source), step=held, device=device)
    if member.step < 0:
        raise PeerLost(f"worker-{this_round.source}", "it has no whole state to give")


def run(process: Process, metrics: Metrics, control: ControlClient, member: CollectiveMember) -> None:
    """The role of a DataParallel worker."""
    machine.set_interface(os.environ, toward=split_address(process.config.addresses.rendezvous)[0])
    # By these an iterable data set finds the stream of its rank, as under torchrun.
    os.environ.setdefault(environment.RANK, str(process.rank))
    os.environ.setdefault(environment.WORLD_SIZE, str(process.config.world_size))
    CollectiveWorker(process=process, metrics=metrics, control=control, member=member).run()
