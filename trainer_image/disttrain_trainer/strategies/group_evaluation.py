"""Evaluations as a rank of a group takes part in them: between two steps, and of the final parameters, with the model's file.

Every rank of the group calls the cut model, and finds the same numbers; the first one reports them.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from disttrain_trainer.checkpoint import course as courses
from disttrain_trainer.checkpoint import model_file
from disttrain_trainer.checkpoint.measured import Evaluation
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.flat import DTYPES, Vectors
from disttrain_trainer.model.hooks import STOP
from disttrain_trainer.model.task import Task
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.group_member import GroupMember
from disttrain_trainer.net.members import Round
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.parallel.pipeline_forward import NeedsWholeModel
from disttrain_trainer.parameter_server.client import ShardedClient
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.memory import zeros
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.strategies.all_reduce import copies_of_buffers, put_back
from disttrain_trainer.strategies.group_exchange import GroupModel
from disttrain_trainer.strategies.group_models import GroupModels
from disttrain_trainer.strategies.group_orders import Orders
from disttrain_trainer.strategies.served_rounds import ServedRounds

log = logs.get_logger(__name__)


class GroupEvaluation:
    """Those of one rank. For the training thread."""

    def __init__(
        self,
        *,
        process: Process,
        control: ControlClient,
        member: GroupMember,
        task: Task,
        models: GroupModels,
        served: ServedRounds,
    ) -> None:
        self._name = process.name
        self._config = process.config
        self._member = member
        self._kept: int | None = None
        self._parameters: Vectors = ()
        self._buffers: dict[str, torch.Tensor] = {}
        """Sync: the kept step, its packed parameters and the buffers: another group can evaluate it when the one that does is lost."""
        self._is_sync = process.config.strategy.synchronous
        self._control = control
        self._task = task
        self._models = models
        self._served = served
        self.model_dir = model_file.place_of(task.model, process.model_dir)
        """Where the model's file is written; None: nowhere."""

    def forget(self) -> None:
        """The servers went back to a checkpoint: the step is done again."""
        self._kept, self._parameters, self._buffers = None, (), {}

    def keep(self, own: GroupModel, step: int) -> None:
        """Sync: keeps the parameters and buffers, which are those of this step, if it is to be evaluated."""
        total = self._task.schedule.total_steps
        if not self._is_sync or step == self._kept or not courses.is_due(self._config, step, total=total):
            return
        self._parameters = tuple(vector.clone() for vector in own.values.parameters)
        self._buffers, self._kept = copies_of_buffers(own.model.module), step

    def between(self, own: GroupModel, client: ShardedClient, this_round: Round, orders: Orders, step: int) -> None:
        """Carries out the master's order, on every rank. Afterwards the model is that of no step. Raises PeerLost, WrongInput, and what the
        user's code raises."""
        evaluator, stay = self._task.evaluate, this_round.lease
        if evaluator is None:
            return
        found = self._take(own, client, orders, step)
        if orders.leads:
            said = {"missing": True} if found is None else {"begun": True}
            self._control.send(MessageType.EVALUATED, stay=stay, **said)
        if found is None:
            return
        buffers = copies_of_buffers(own.model.module)
        try:
            numbers = evaluator(own.pipeline.forward_model() if own.pipeline is not None else own.model.module)
        except NeedsWholeModel as error:
            raise WrongInput(
                f"trainer.evaluateEverySteps: {error}, and no process puts it together between two steps: call the model alone in "
                "trainer.evaluate, or evaluate at the end only (0)"
            ) from None
        courses.require_metrics(numbers, self._config)
        put_back(own.model.module, buffers)
        own.buffers.forget()
        hooks = self._task.hooks
        (stops,) = orders.count(hooks is not None and hooks.evaluated(numbers))
        if orders.leads:
            stop = {"stop": STOP} if stops else {}
            self._control.send(MessageType.EVALUATED, stay=stay, step=found, evaluation=numbers, **stop)

    def _take(self, own: GroupModel, client: ShardedClient, orders: Orders, step: int) -> int | None:
        """Makes the model that of the step, under Async the newest one; its step. None where it is gone. Raises PeerLost."""

        def pull() -> float:
            client.join()
            versions = client.pull(own.values.parameters, step=step if self._is_sync else None)
            has_it = not self._is_sync or all(version == step for version in versions)
            lacks = not (has_it and own.buffers.take(client, step))
            client.leave()
            return float(lacks)

        own.trained = True
        (lacking,) = orders.count(self._kept != step)
        if not lacking:
            for vector, kept in zip(own.values.parameters, self._parameters, strict=True):
                vector.copy_(kept)
        elif orders.together(pull):
            return None
        own.values.put_in()
        if not lacking:
            put_back(own.model.module, self._buffers)
            return step
        self.keep(own, step)
        return step if self._is_sync else client.versions[0] // self._config.parts_per_step

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
        course = self._member.course  # of the first rank
        known = course.evaluation if course.evaluated == last else None
        told = orders.share({"written": folder is None or "model" in found, "known": known})
        if not told["written"]:
            return
        if told["known"] is not None:
            found["evaluation"] = told["known"]  # the training has ended at an evaluation
        elif self._task.evaluate is not None:
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
