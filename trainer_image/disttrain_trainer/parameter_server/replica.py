"""A worker's copy of the model that the servers train: its parameters are theirs, and under Sync its buffers are those of the step."""

from torch import nn

from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import by_name, origin
from disttrain_trainer.checkpoint.buffers import Buffers
from disttrain_trainer.data.schedule import BatchPart
from disttrain_trainer.model.flat import FlatModel
from disttrain_trainer.model.initial import InitialParameters
from disttrain_trainer.model.part_buffers import PartBuffers
from disttrain_trainer.model.task import Task
from disttrain_trainer.net.members import Round
from disttrain_trainer.parameter_server.client import ShardedClient
from disttrain_trainer.parameter_server.staging import Staging
from disttrain_trainer.runtime.process import Process


class Replica:
    """The model of one worker. For one thread.

    Its methods raise PeerLost and RoundOver where they ask the servers.
    """

    def __init__(self, process: Process, task: Task, *, is_sync: bool) -> None:
        config: JobConfig = process.config
        module = task.model
        self._start = origin.taken(process.checkpoint_dir, config) if process.checkpoint_dir else None
        """The checkpoint of another job that the training starts with."""
        self._load_start(module)
        self.model = FlatModel(module)
        self.staging = Staging(self.model)
        self.saved_buffers = Buffers(module, process.checkpoint_dir, self.model.described())
        self._first = InitialParameters(config, self.model.parameters, prepare=self._load_start)
        self._is_sync = is_sync
        self._parts_per_step = config.parts_per_step
        buffers = PartBuffers(module)
        self._step_buffers = buffers if is_sync and buffers.there_are_some else None
        """Sync: the buffers of each step, which the first server keeps."""
        self._holds_step: int | None = None
        """The step whose buffers `_step_buffers` holds."""
        self._left_for: int | None = None
        """The step that starts from what this worker's part 0 left."""
        self.round_number = 0
        """The newest round that has begun here."""
        self.trained = False
        """Whether parameters and buffers are no longer those of a new model."""

    def begin(self, client: ShardedClient, this_round: Round) -> None:
        """Sets parameters and buffers to the state of the round: this worker may be new, or the servers went back to a checkpoint."""
        another = this_round.number != self.round_number
        reset_buffers = another and this_round.from_scratch and self.saved_buffers.there_are_some
        if self.trained and (reset_buffers or not client.initialized):
            # The worker's parameters contain the lost steps: to offer them to the servers would apply these steps twice.
            self.saved_buffers.reset(self._first.restore(self.model.parameters))
            self.staging.to_host()
            self.trained = False
        if not client.initialized:
            client.initialize(self.staging.parameters)
        if another and this_round.buffers is not None:
            self.saved_buffers.restore(this_round.buffers)
        if another:
            self._holds_step = self._left_for = None
        self.round_number = this_round.number

    def pull(self, client: ShardedClient, step: int) -> bool:
        """Takes over the servers' parameters, under Sync those of this step. False when a later step has taken its place."""
        self.trained = True
        return self.took_over(client.pull(self.staging.parameters, step=step if self._is_sync else None), step)

    def took_over(self, versions: tuple[int, ...], step: int) -> bool:
        """After parameters of these versions came: whether they are good for the step. Sync: exactly its own are."""
        self.staging.to_device()
        return not self._is_sync or all(version == step for version in versions)

    def take_buffers(self, client: ShardedClient, step: int) -> bool:
        """Sync: makes the model's buffers those of a step. False when a later step has taken its place."""
        if self._step_buffers is None:
            return True
        if self._holds_step == step:
            self._step_buffers.restore()
            return True
        if self._left_for == step:
            self._step_buffers.advance()
        else:
            found = client.fetch_buffers(step)
            if found is None:
                return False
            if found:
                self._step_buffers.take(found)
        self._step_buffers.begin()
        self._holds_step = step
        return True

    def forget_step(self) -> None:
        """Parameters and buffers are not those of the training any more: they are asked for again."""
        self._holds_step = self._left_for = None

    def leave_buffers(self, client: ShardedClient, part: BatchPart, *, again: bool = False) -> None:
        """Sync: after a part. What part 0 leaves goes to the servers before its gradient, which may complete the step. again: they may
        have it already; the model's buffers may be others by now."""
        if self._step_buffers is None:
            return
        number = part.index % self._parts_per_step
        if not again:
            self._step_buffers.left(step=part.step, part=number)
        if not number:
            client.keep_buffers(part.step, self._step_buffers.encoded())
            self._left_for = part.step + 1

    def _load_start(self, module: nn.Module) -> None:
        if self._start is not None:
            by_name.load_model(self._start.folder, module, source=self._start.of)
