"""The evaluation of a worker of parameter servers between two steps, while the others train on (docs/design/0020).

Sync: the parameters of exactly one step are evaluated. Each worker that computes a part of that step keeps a copy of them, so that another
worker can evaluate them when the one that does is lost.
"""

import torch

from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import course as courses
from disttrain_trainer.model.evaluation import Evaluator
from disttrain_trainer.model.hooks import STOP
from disttrain_trainer.model.task import Task
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import ParameterServerMember, Round
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.parameter_server.client import ShardedClient
from disttrain_trainer.parameter_server.replica import Replica
from disttrain_trainer.strategies.all_reduce import copies_of_buffers, put_back


class ServedEvaluation:
    """That of one worker. For the training thread."""

    def __init__(
        self,
        *,
        config: JobConfig,
        control: ControlClient,
        member: ParameterServerMember,
        task: Task,
        replica: Replica,
        evaluator: Evaluator,
    ) -> None:
        self._config = config
        self._control = control
        self._member = member
        self._task = task
        self._replica = replica
        self._evaluator = evaluator
        self._is_sync = config.strategy.synchronous
        self._step: int | None = None
        self._parameters: list[torch.Tensor] = []
        self._buffers: dict[str, torch.Tensor] = {}
        """The kept parameters and buffers, and their step."""

    def forget(self) -> None:
        """The servers went back to a checkpoint: the step is done again."""
        self._step, self._parameters, self._buffers = None, [], {}

    def keep(self, step: int) -> None:
        """Sync: keeps the parameters and buffers, which are those of this step, if it is to be evaluated."""
        total = self._task.schedule.total_steps
        if not self._is_sync or step == self._step or not courses.is_due(self._config, step, total=total):
            return
        if not self._parameters:
            self._parameters = [vector.clone() for vector in self._replica.model.parameters]
        else:
            for kept, vector in zip(self._parameters, self._replica.model.parameters, strict=True):
                kept.copy_(vector)
        self._buffers, self._step = copies_of_buffers(self._task.model), step

    def run(self, client: ShardedClient, this_round: Round) -> None:
        """Carries out the master's order. Afterwards the model is that of no step. Raises what the servers' client and user code raise."""
        with self._control.changed:
            step, self._member.between = self._member.between, None
        if step is None or self._member.round is not this_round:
            return
        found = self._take(client, step)
        if found is None:
            self._control.send(MessageType.EVALUATED, stay=this_round.lease, missing=True)
            return
        self._control.send(MessageType.EVALUATED, stay=this_round.lease, begun=True)
        buffers = copies_of_buffers(self._task.model)
        numbers = self._evaluator(self._task.model)
        courses.require_metrics(numbers, self._config)
        put_back(self._task.model, buffers)
        self._replica.forget_step()
        hooks = self._task.hooks
        stop = {"stop": STOP} if hooks is not None and hooks.evaluated(numbers) else {}
        self._control.send(MessageType.EVALUATED, stay=this_round.lease, step=found, evaluation=numbers, **stop)

    def _take(self, client: ShardedClient, step: int) -> int | None:
        """Makes the model that of the step, under Async the newest one; its step. None where it is gone."""
        model, replica = self._task.model, self._replica
        if self._step == step:
            with torch.no_grad():
                for vector, kept in zip(replica.model.parameters, self._parameters, strict=True):
                    vector.copy_(kept)
            put_back(model, self._buffers)
            return step
        client.join()
        has_it = replica.pull(client, step) and replica.take_buffers(client, step)
        client.leave()
        if not has_it:
            return None
        self.keep(step)
        return step if self._is_sync else client.versions[0] // self._config.parts_per_step
