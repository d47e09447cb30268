"""The role of a worker that holds a part of the model: FullyShard, HybridShard, ModelParallel and Hybrid.

Torch's wrappers live for one round, as the groups that they are made with do: each round makes the model again, cuts it, and takes over the
state that is held here or by the rank of a copy; where that is lost, every rank loads its part of the newest checkpoint.
"""

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from disttrain.api.mesh import Coordinate
from disttrain.api.runtime import ProgressModel
from disttrain_trainer.checkpoint import by_name, final, model_file, origin, store, tensors
from disttrain_trainer.checkpoint.by_name import NamedCheckpoint
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.checkpoint.manifest import NAME
from disttrain_trainer.checkpoint.measured import Measured
from disttrain_trainer.errors import PeerLost, UserError, WrongInput
from disttrain_trainer.loop.loop import TrainingLoop
from disttrain_trainer.model.flat import described
from disttrain_trainer.model.initial import FactoryNotRepeatable
from disttrain_trainer.model.objective import Objective
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.parallel import backend, shard_factory, shard_state
from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.parallel.compose import LocalModel, ParallelContext, compose
from disttrain_trainer.parallel.mesh import Groups, mesh_of
from disttrain_trainer.parallel.pipeline import Pipeline
from disttrain_trainer.parallel.pipeline_forward import NeedsWholeModel
from disttrain_trainer.parallel.shard_factory import ShardFactoryOptimizer
from disttrain_trainer.parallel.shard_optimizer import ShardOptimizer
from disttrain_trainer.parallel.shard_state import ShardState
from disttrain_trainer.parallel.sharded_model import ShardedModel
from disttrain_trainer.parallel.shared_buffers import SharedBuffers
from disttrain_trainer.runtime import logs, machine
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.runtime.sockets import split_address
from disttrain_trainer.runtime.termination import of_user_error
from disttrain_trainer.strategies import last_evaluation
from disttrain_trainer.strategies.evaluations import RankEvaluations
from disttrain_trainer.strategies.rank import Rank, RoundEnded
from disttrain_trainer.strategies.shard_checkpoints import ShardCheckpoints, Writers
from disttrain_trainer.strategies.shard_exchange import ShardExchange

log = logs.get_logger(__name__)

_MIXED = "mixed torch.Tensor and DTensor"
"""In what torch says of an operation on a whole tensor and a part of one."""
_LAST_STATE = ".last-state"
"""The folder beside the trained model, in which the ranks put their blocks of it where the job has no checkpoints."""


class ShardedWorker(Rank):
    """One rank of the job."""

    def __init__(self, *, process: Process, metrics: Metrics, control: ControlClient, member: CollectiveMember) -> None:
        super().__init__(process=process, metrics=metrics, control=control, member=member)
        config, task = self._config, self._task
        self._mesh = mesh_of(config)
        self._at: Coordinate = self._mesh.coordinate(process.rank)
        shard_state.check(task.model)
        self._layout = described(task.model)
        self._dtypes = {name: parameter.dtype for name, parameter in task.model.named_parameters()}
        self._model_dir = model_file.place_of(task.model, process.model_dir)
        with control.changed:
            member.data = task.data
            member.layout = shard_state.digest_of(task.model, self._layout, self._mesh)
        self._fresh: nn.Module | None = task.model
        """A model of the factory's that no round has cut yet."""
        self._held: dict[str, torch.Tensor] = {}
        """This rank's state, `member.step` steps old, by the names of ShardState.present."""
        root = process.checkpoint_dir if config.checkpoint is not None else None
        self._checkpoints = self._checkpoints_in(root) if root is not None else None
        self._last_state = (
            self._checkpoints_in(self._model_dir / _LAST_STATE)
            if root is None and self._model_dir is not None
            else self._checkpoints
        )
        """What writes the state after the last step."""
        self._loop: TrainingLoop | None = None

    @property
    def saves(self) -> ShardCheckpoints | None:
        return self._checkpoints

    def resume(self) -> None:
        """Rank 0 finds the newest checkpoint that holds, and tells the master its step."""
        if self._process.rank:
            return
        self._member.checkpoint = 0
        if self._process.checkpoint_dir is None:
            log.info("there is no checkpoint volume: if all workers are lost, the training starts again at step 0")
            return
        found = origin.look(self._process.checkpoint_dir, self._config, self._task.data)
        if self._checkpoints is not None:
            self._checkpoints.resumed = found.describe(self._config)
        if found.checkpoint is None and found.start is not None:
            # Here, where no round has cut it: a rank does not see what its part lacks.
            by_name.require_fit(found.start.folder, self._task.model, source=found.start.of)
        if found.checkpoint is not None:
            self._member.checkpoint = found.checkpoint.manifest.step
            self._member.course = found.checkpoint.manifest.course
            self._metrics.checkpoint_step = found.checkpoint.manifest.step

    def go_back(self) -> None:
        """What this rank holds is forgotten: every rank loads its part of the checkpoint that rank 0 finds."""
        if self._last_state is not None:
            self._last_state.end()
        self._held = {}
        self._member.step, self._member.course = -1, Course()
        self.resume()

    def take_part_in(self, this_round: Round) -> None:
        """One round: cut the model, take over the state, train to the end, wait for the others."""
        try:
            self._work_in(this_round)
        finally:
            if self._last_state is not None:
                self._last_state.end()  # before this rank is ready: the next round may begin from what is being written
        self.await_the_others(this_round)

    def _work_in(self, this_round: Round) -> None:
        config, process, task, member = self._config, self._process, self._task, self._member
        with self.group_of(this_round) as group:
            try:
                groups = (
                    Groups.of(self._mesh, rank=process.rank, device=task.device.type) if group is not None else None
                )
                # All groups are made here: the store that they meet in may be lost with its master, and the round goes on.
                writers = self._writers(this_round)
            except RuntimeError as error:
                raise BrokenGroup(error) from None
            is_cold = not this_round.holders  # the model, or its plan, may be another one than before
            context = ParallelContext(
                config=config,
                mesh=self._mesh,
                at=self._at,
                groups=groups,
                loss=task.loss,
                device=task.device,
                autocast=task.autocast,
                sample=task.first_samples if is_cold else None,
            )
            local = self._composed(context, this_round)
            model = ShardedModel(local, layout=self._layout, at=self._at)
            optimizer = self._optimizer_of(model, this_round, tried=is_cold)
            state = ShardState(
                model,
                optimizer,
                self._layout,
                keeps_buffers=self._at.replicate == self._at.shard == self._at.tensor == 0,
            )
            self._enter(this_round, state, groups)
            self._held = state.present()
            loop = self._loop = self._loop or self.new_loop(model, counts=self._mesh.counts(process.rank))
            objective = Objective(local.module, task.autocast.loss(task.loss), reads_weights=task.batches_per_step > 1)
            loop.adopt(model, local.pipeline or objective)
            checkpoints = self._checkpoints
            if self._last_state is not None:
                self._last_state.begin(model, state, writers)
            log.info("round %d begins at step %d", this_round.number, member.step)
            may_change = tensors.may_have_buffers(local.module)
            exchange = ShardExchange(
                process=process,
                metrics=self._metrics,
                control=self._control,
                member=member,
                this_round=this_round,
                loop=loop,
                task=task,
                mesh=self._mesh,
                groups=groups,
                model=model,
                pipeline=local.pipeline,
                optimizer=optimizer,
                buffers=SharedBuffers(local.module, task.device) if may_change and groups is not None else None,
                parameters=len(self._layout.places),
                checkpoints=checkpoints,
                plan_field=context.plan_field if is_cold else None,
                evaluations=self._evaluations(this_round, model, local.pipeline),
                computed_in=task.autocast.dtype,
            )
            try:
                self.train(loop, exchange, this_round, together=groups is not None)
            except RuntimeError as error:
                if _MIXED not in str(error):
                    raise
                raise UserError(
                    "trainer.loss or trainer.model uses a parameter outside the forward() of its module, which is cut over the workers "
                    f"({of_user_error(error)[1].where}): there it is a part of itself. Use it within forward(), or train with sharding "
                    "Replicated"
                ) from None
            finally:
                exchange.restore_buffers()
                self._held = state.present()
            self._finish(this_round, model, local.pipeline)

    def _evaluations(self, this_round: Round, model: ShardedModel, run: Pipeline | None) -> RankEvaluations | None:
        """Those between two steps: every rank calls the cut model together, and finds the same numbers. run: as of `_finish`."""
        evaluator, process, loop = self._task.evaluate, self._process, self._loop
        if evaluator is None or loop is None or not self._config.trainer.evaluate_every_steps:
            return None

        def measure(number: int, of: int) -> Measured:
            try:
                measured = evaluator.measure(run.forward_model() if run is not None else model.module)
            except NeedsWholeModel as error:
                raise WrongInput(
                    f"trainer.evaluateEverySteps: {error}, and no process puts it together between two steps: call the model alone in "
                    "trainer.evaluate, or evaluate at the end only (0)"
                ) from None
            if process.rank == 0 and self._checkpoints is not None:
                # Before any rank goes on: one that ends here writes its last file into the same folder, which is tidied after a save.
                self._checkpoints.wait()
            return measured

        return RankEvaluations(
            process=self._process,
            task=self._task,
            loop=loop,
            control=self._control,
            member=self._member,
            this_round=this_round,
            measure=measure,
            kept=self._checkpoints.keep_course if process.rank == 0 and self._checkpoints is not None else None,
            all_call=True,
            agree=self.agree,
        )

    def _composed(self, context: ParallelContext, this_round: Round) -> LocalModel:
        """A new model, cut. Raises BrokenGroup where a peer is lost meanwhile, which what it calls says in its own ways."""
        model = self._new_model()
        try:
            return compose(model, context)
        except (RuntimeError, WrongInput) as error:
            if context.groups is not None and self.has_ended(this_round):
                raise BrokenGroup(error) from None
            raise

    def _optimizer_of(
        self, model: ShardedModel, this_round: Round, *, tried: bool
    ) -> ShardOptimizer | ShardFactoryOptimizer:
        """tried: that of a factory makes some steps with made-up numbers. Raises BrokenGroup where a peer is lost meanwhile."""
        make, config = self._task.make_optimizer, self._config
        if make is None:
            return ShardOptimizer(config.trainer.loop.optimizer, model)
        found = ShardFactoryOptimizer(make, model, scheduled=config.trainer.learning_rate_schedule is not None)
        try:
            if tried:
                shard_factory.require_same(make, model, self._layout, self._dtypes)
        except (RuntimeError, WrongInput) as error:
            if dist.is_initialized() and self.has_ended(this_round):
                raise BrokenGroup(error) from None
            raise
        return found

    def _new_model(self) -> nn.Module:
        """A model that no round has cut. Raises FactoryNotRepeatable where the factory returns one that it keeps."""
        fresh, self._fresh = self._fresh, None
        if fresh is None:
            fresh = self._task.make_model().to(self._task.device)
            if any(hasattr(parameter, "device_mesh") for parameter in fresh.parameters()):
                raise FactoryNotRepeatable(
                    "trainer.model returned the same model a second time, which is cut over workers that are lost: a new process has to"
                )
        return fresh

    def _enter(self, this_round: Round, state: ShardState, groups: Groups | None) -> None:
        """Takes over the state that the round begins with, as the master has decided from where."""
        member = self._member
        if not this_round.holders:
            member.step = -1
            self._load(state, max(0, this_round.step))
            member.step = max(0, this_round.step)
            return
        own = self._process.rank
        copies = self._mesh.replicas_of(own)
        if own in this_round.holders:
            state.take(self._held, source="the round before")
        else:
            member.step = -1
        if groups is not None and not this_round.holders.issuperset(copies):
            source = min(rank for rank in copies if rank in this_round.holders)
            state.receive(source=source, step=this_round.step, device=self._task.device, group=groups.replicate)
        member.step = this_round.step

    def _load(self, state: ShardState, step: int) -> None:
        """This rank's part of the checkpoint of a step; at step 0 the model that the job starts with. Raises PeerLost, WrongInput."""
        root = self._process.checkpoint_dir
        if root is None:
            return
        folder = root / store.name_of(step)
        if step or (folder / NAME).exists():
            if not (folder / NAME).exists():
                raise PeerLost(
                    folder.name, "this process does not see the checkpoint: the volume must be one for all workers"
                )
            state.load(folder)
        elif (start := origin.taken(root, self._config)) is not None:
            state.load(start.folder, model_only=True, source=start.of)

    def _finish(self, this_round: Round, model: ShardedModel, run: Pipeline | None) -> None:
        """The last step is done: save, write the model, evaluate; all ranks together. run: that of this rank's stages."""
        member, checkpoints = self._member, self._last_state
        if checkpoints is not None:
            checkpoints.save_last()
            if self._process.rank == 0 and self._model_dir is not None and member.model is None:
                self._write_model(this_round, checkpoints.last_folder, self._model_dir)
        course = member.course
        if course.evaluated == member.step and course.evaluation is not None:
            member.evaluation = course.evaluation if self._process.rank == 0 else None
        elif self._task.evaluate is not None:
            try:
                last = self._last_state
                found = last_evaluation.measure(
                    self._task.evaluate,
                    model,
                    run,
                    make_whole=self._task.make_model if self._process.rank == 0 else None,
                    device=self._task.device,
                    folder=last.last_folder if last is not None else None,
                )
            except RuntimeError as error:
                if self.has_ended(this_round):
                    raise BrokenGroup(error) from None
                raise
            if self._task.hooks is not None and found is not None:
                self._task.hooks.evaluated(found)
            if self._process.rank == 0:  # the same on every rank
                member.evaluation = found
        if checkpoints is not None and self._checkpoints is None and self._process.rank == 0:
            shutil.rmtree(checkpoints.last_folder.parent, ignore_errors=True)
        if self._process.rank == 0 and checkpoints is not None and self._checkpoints is not None:
            over = self.over(this_round)
            if not final.insist("last checkpoint", member.step, checkpoints.finish, over=over):
                raise RoundEnded

    def _write_model(self, this_round: Round, last: Path, target: Path) -> None:
        """Rank 0: puts the blocks of the last state together, some at a time. Raises RoundEnded."""

        def write() -> ProgressModel:
            with NamedCheckpoint(last) as checkpoint:
                return model_file.write(checkpoint.sources(), target)

        member = self._member
        member.model = model_file.insist(write, step=member.step, over=self.over(this_round))
        if member.model is None:
            raise RoundEnded

    def _writers(self, this_round: Round) -> Writers:
        """Every rank must call it: it makes a group."""
        member = self._member
        ranks = tuple(ranks[0] for ranks in self._mesh.replicas())
        group = dist.new_group([*ranks], backend=backend.NAME) if dist.is_initialized() else None
        return Writers(
            ranks=ranks,
            group=group if isinstance(group, dist.ProcessGroup) else None,  # a number for a rank outside
            alive=lambda: member.round is this_round,
        )

    def _checkpoints_in(self, root: Path) -> ShardCheckpoints:
        return ShardCheckpoints(
            config=self._config,
            rank=self._process.rank,
            root=root,
            keep=self._config.checkpoint.keep if self._config.checkpoint is not None else 1,
            metrics=self._metrics,
            control=self._control,
            member=self._member,
            data=self._task.data,
            lasting=root == self._process.checkpoint_dir,
        )


def run(process: Process, metrics: Metrics, control: ControlClient, member: CollectiveMember) -> None:
    """The role of a worker of a sharded model."""
    machine.set_interface(os.environ, toward=split_address(process.config.addresses.rendezvous)[0])
    ShardedWorker(process=process, metrics=metrics, control=control, member=member).run()
