"""The end of a training as a rank of a group takes part in it: the model's file, and the user's evaluation of the final parameters."""

from collections.abc import Callable
from functools import partial

from torch import nn

from disttrain_trainer.checkpoint import model_file
from disttrain_trainer.checkpoint.measured import Evaluation
from disttrain_trainer.model.flat import DTYPES
from disttrain_trainer.model.task import Task
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import Round
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.parallel.pipeline_forward import NeedsWholeModel
from disttrain_trainer.parameter_server.client import ShardedClient
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.memory import zeros
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.strategies.group_exchange import GroupModel
from disttrain_trainer.strategies.group_models import GroupModels
from disttrain_trainer.strategies.group_orders import Orders
from disttrain_trainer.strategies.served_rounds import ServedRounds

log = logs.get_logger(__name__)


class GroupEvaluation:
    """That of one rank. For the training thread."""

    def __init__(
        self, *, process: Process, control: ControlClient, task: Task, models: GroupModels, served: ServedRounds
    ) -> None:
        self._name = process.name
        self._is_sync = process.config.strategy.synchronous
        self._control = control
        self._task = task
        self._models = models
        self._served = served
        self.model_dir = model_file.place_of(task.model, process.model_dir)
        """Where the model's file is written; None: nowhere."""

    def run(self, own: GroupModel, client: ShardedClient, this_round: Round, orders: Orders, last: int) -> None:
        """All parts are applied: the first rank writes the file of the final parameters, and all compute the user's `evaluate`.

        The file is written first: an evaluation that fails, or that changes the model, must not cost the training. Raises PeerLost.
        """
        folder = self.model_dir
        needs_whole = orders.leads and (folder is not None or own.pipeline is not None)
        vectors = tuple(
            zeros(vector.length if needs_whole else 0, DTYPES[vector.dtype]) for vector in self._models.layout.vectors
        )

        def pull() -> float:
            client.join()
            step = last if self._is_sync else None
            if needs_whole:
                client.see_all()
                client.pull(vectors, step=step)
            else:
                client.pull(own.values.parameters, step=step)
            own.buffers.take(client, client.versions[0])
            client.leave()
            return 0.0

        own.trained = True
        orders.together(pull)
        if needs_whole:
            own.values.put_in_from(vectors)
        else:
            own.values.put_in()
        collected = own.buffers.collect() if self._models.there_are_buffers else {}
        found: dict[str, object] = {}
        over = partial(self._served.over, this_round)
        if needs_whole:
            self._models.whole.put(collected)
            whole = self._models.whole.fill(vectors)
            if folder is not None:
                written = model_file.insist(
                    lambda: model_file.write(model_file.state_of(whole), folder), step=last, over=over
                )
                if written is not None:
                    found["model"] = written.to_dict()
        if orders.share(folder is None or "model" in found) is False:
            return
        if self._task.evaluate is not None:
            evaluation = self._numbers(self._task.evaluate, own, orders)
            if evaluation is not None:
                found["evaluation"] = evaluation
                if self._task.hooks is not None:
                    self._task.hooks.evaluated(evaluation)
        if orders.leads:
            self._control.send(MessageType.EVALUATED, stay=this_round.lease, **found)

    def _numbers(
        self, evaluate: Callable[[nn.Module], Evaluation], own: GroupModel, orders: Orders
    ) -> Evaluation | None:
        """By the cut model, which every rank calls with the same batches. None on a rank that leaves it to the first one."""
        run = own.pipeline
        if run is None:
            return evaluate(own.model.module)
        try:
            return evaluate(run.forward_model())
        except NeedsWholeModel as error:
            if not orders.leads:
                return None
            log.warning("%s: %s puts the whole model together for it", error, self._name)
            return evaluate(self._models.whole.module.to(self._task.device))
