"""The models that a rank of a group cuts: another one for each process group, and one where its state contains lost steps."""

from copy import deepcopy

from torch import nn

from disttrain.api.mesh import Coordinate, Mesh
from disttrain_trainer.checkpoint import by_name, origin
from disttrain_trainer.loop.loop import TrainingLoop
from disttrain_trainer.model.flat import Layout, Place, described
from disttrain_trainer.model.initial import FactoryNotRepeatable
from disttrain_trainer.model.objective import Objective
from disttrain_trainer.model.parameter_groups import groups_of
from disttrain_trainer.model.part_buffers import PartBuffers
from disttrain_trainer.model.task import Task
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.parallel.compose import ParallelContext, compose
from disttrain_trainer.parallel.mesh import Groups
from disttrain_trainer.parallel.sharded_model import ShardedModel
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.strategies.group_buffers import Outline, StepBuffers
from disttrain_trainer.strategies.group_exchange import GroupModel
from disttrain_trainer.strategies.group_orders import Orders
from disttrain_trainer.strategies.group_values import GroupValues


class GroupModels:
    """Those of one rank, and the loop that trains the present one."""

    def __init__(
        self, *, process: Process, metrics: Metrics, control: ControlClient, task: Task, mesh: Mesh, at: Coordinate
    ) -> None:
        """mesh: of one group. at: this rank's place in it."""
        self._process = process
        self._config = config = process.config
        self._task = task
        self._mesh = mesh
        self._at = at
        self._places, self.layout = described(task.model), Layout.of(task.model)
        places = [Place(name=p.name, vector=p.vector, start=p.start, stop=p.stop) for p in self._places.places]
        self.parameter_groups = groups_of(config.trainer.loop.optimizer, places)
        """Of trainer.optimizer, in the whole vectors."""
        self.there_are_buffers = PartBuffers(task.model).there_are_some
        self._start = origin.taken(process.checkpoint_dir, config) if process.checkpoint_dir else None
        """The checkpoint of another job that the training starts with."""
        self._fresh: nn.Module | None = task.model
        """A model of the factory's that is not cut yet."""
        self._outline: Outline | None = None
        self._metrics = metrics
        self._control = control
        self._loop: TrainingLoop | None = None

    @property
    def loop(self) -> TrainingLoop:
        """Once there is a model."""
        assert self._loop is not None
        return self._loop

    @property
    def whole(self) -> Outline:
        """On the first rank, once there is a model."""
        assert self._outline is not None
        return self._outline

    @property
    def plan_field(self) -> str:
        """The field by which layers are cut."""
        own = self._config.trainer.loop.parallelize
        return "trainer.parallelize" if own else "strategy.modelParallel.tensor"

    def new(self, groups: Groups, orders: Orders) -> GroupModel:
        """This rank's part of a new model. Every rank of the group must call it."""
        config, task = self._config, self._task
        context = ParallelContext(
            config=config,
            mesh=self._mesh,
            at=self._at,
            groups=groups,
            loss=task.loss,
            device=task.device,
            autocast=task.autocast,
            sample=task.first_samples,
        )
        whole = self._new_model()
        if orders.leads:
            self._outline = Outline(deepcopy(whole).to("cpu"), self._places, self._process.checkpoint_dir)
        local = compose(whole, context)
        model = ShardedModel(local, layout=self._places, at=self._at)
        values = GroupValues(model, layout=self.layout, places=self._places, groups=groups)
        buffers = StepBuffers(
            local.module,
            orders,
            synchronous=config.strategy.synchronous,
            parts_per_step=config.parts_per_step,
            there_are_some=self.there_are_buffers,
            stages=self._mesh.pipeline,
            gives=self._at.tensor == 0,
        )
        objective = local.pipeline or Objective(
            local.module, task.autocast.loss(task.loss), reads_weights=task.batches_per_step > 1
        )
        if self._loop is None:
            self._loop = TrainingLoop(
                task,
                model,
                name=self._process.name,
                metrics=self._metrics,
                send=lambda fields: self._control.send(MessageType.REPORT, **fields),
                counts=self._mesh.counts(self._mesh.rank(self._at)),
                defers=config.trainer.nan_policy is not None,
            )
        self._loop.adopt(model, objective)
        return GroupModel(model=model, pipeline=local.pipeline, values=values, buffers=buffers)

    def _new_model(self) -> nn.Module:
        """A whole model. Raises FactoryNotRepeatable where the factory returns one that it keeps."""
        fresh, self._fresh = self._fresh, None
        if fresh is None:
            fresh = self._task.make_model()
            if any(hasattr(parameter, "device_mesh") for parameter in fresh.parameters()):
                raise FactoryNotRepeatable(
                    "trainer.model returned the same model a second time, which is cut over a group that is lost: a new process has to"
                )
        if self._start is not None:
            by_name.load_model(self._start.folder, fresh, source=self._start.of)
        return fresh.to(self._task.device)
