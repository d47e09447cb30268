"""The exchange of ParameterServer: a worker gets parts from the master, and pushes the gradient of each to the servers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from disttrain_trainer.data.loading import Loading
from disttrain_trainer.data.schedule import BatchPart, Schedule
from disttrain_trainer.errors import PeerLost
from disttrain_trainer.loop.loop import TrainingLoop
from disttrain_trainer.model.flat import Vectors, norm, runs_of
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import ParameterServerMember
from disttrain_trainer.parameter_server.assignments import Assignments
from disttrain_trainer.parameter_server.client import WHOLE, GradientInfo, ShardedClient
from disttrain_trainer.parameter_server.replica import Replica
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.strategies.accumulation import Accumulation
from disttrain_trainer.strategies.hedging import Hedging
from disttrain_trainer.strategies.kept_gradient import KeptGradient, Unconfirmed
from disttrain_trainer.strategies.local_steps import LocalSteps
from disttrain_trainer.strategies.served_evaluation import ServedEvaluation

IDLE_SECONDS = 0.02
"""Seconds without an assignment after which a worker leaves, so that no other worker waits for it."""


class PushPull:
    """The Exchange of one worker in one round: one part at a time.

    Its methods raise PeerLost when a server is lost, and RoundOver when the servers have begun another round.
    """

    def __init__(
        self,
        *,
        control: ControlClient,
        member: ParameterServerMember,
        metrics: Metrics,
        assignments: Assignments,
        client: ShardedClient,
        loop: TrainingLoop,
        schedule: Schedule,
        replica: Replica,
        is_sync: bool,
        every: int,
        save: Callable[[], None],
        evaluate: Callable[[], None],
        on_part: Callable[[], None],
        hedging: Hedging | None = None,
        local: LocalSteps | None = None,
        accumulation: Accumulation | None = None,
        loading: Loading | None = None,
        clips: bool = False,
        evaluation: ServedEvaluation | None = None,
        kept: KeptGradient | None = None,
    ) -> None:
        """hedging: in a job with backup workers. local: in one with local steps. accumulation: in one whose parts are computed in
        portions. clips: in one with a largest norm. evaluation: in one that evaluates between two steps. every: steps between two
        checkpoints, 0 for none. on_part: called after each part that the servers have. kept: a gradient of an earlier lease; not in
        a job with backup workers.

        save, evaluate: carry out the master's orders, between two parts.
        """
        self._control = control
        self._member = member
        self._metrics = metrics
        self._assignments = assignments
        self._client = client
        self._loop = loop
        self._watch = loop.stopwatch
        self._schedule = schedule
        self._replica = replica
        self._model = replica.model
        self._is_sync = is_sync
        self._every = every
        self._save = save
        self._evaluate = evaluate
        self._on_part = on_part
        self._hedging = hedging
        self._local = local
        self._accumulation = accumulation
        self._sends_norm = clips and not is_sync and local is None
        """Async: the gradient of a part is that of an update, and no server has all of it. Sync: the norm is of a sum on the servers."""
        self._loading = loading
        self._evaluation = evaluation
        self._kept = kept
        self._again: Unconfirmed | None = None
        """What is pushed again of the part, which is not computed."""
        self._participates = self._is_current = False
        """Whether this worker counts in the clocks, and whether the parameters are those of the next part."""
        self._was_looked_at = self._is_abandoned = False
        """Of the part that is computed: whether its loss counts in the reports, and whether another worker has done it meanwhile."""
        self._weight: float | None = None
        """Of the part that is computed, where the loss gave one."""
        self._part: BatchPart
        """What is computed."""
        self._gradients: Vectors | None = None
        """Its gradient; None for an empty part."""
        self._info = WHOLE
        self._is_encoded = False
        """Whether the compression, if there is one, has this gradient."""

    def next_parts(self) -> Sequence[BatchPart]:
        """One part, with the parameters and, under Sync, the buffers of its step."""
        client, replica = self._client, self._replica
        while (index := self._next_assignment()) is not None:
            self._watch.start()
            part = self._part = self._schedule.part(index)
            self._foresee(index)
            if not self._participates:
                client.join()
                self._participates = True
            self._again = self._kept.take(index, resumes=self._assignments.resumes) if self._kept is not None else None
            if self._again is not None:
                return (part,)
            if self._hedging is not None:
                part = self._hedge_instead(self._hedging, part)
            else:
                self._is_current = self._is_current or replica.pull(client, part.step)
            self._is_current = self._is_current and replica.take_buffers(client, part.step)
            if self._is_current:
                if self._evaluation is not None:
                    self._evaluation.keep(part.step)
                self._was_looked_at = self._is_abandoned = False
                self._watch.lap("communicate")
                if self._hedging is not None:
                    self._hedging.begin()
                if part.index != index:  # a hedge
                    self._foresee(part.index)
                cut = self._local or self._accumulation
                return (part,) if cut is None else cut.begin(part)
            if self._assignments.is_over:
                break  # nothing is known of the part
            self._finished(part, time.perf_counter())  # its step is over: another worker computed the part
        self._loop.report()
        return ()

    def before(self, part: BatchPart) -> BatchPart | None:
        """Nothing for a part without samples, one that another worker has done, or one whose gradient is kept."""
        self._look_whether_abandoned(part)
        return part if part.samples and not self._is_abandoned and self._again is None else None

    def _foresee(self, index: int) -> None:
        """The part is computed next, and those that are assigned after it."""
        if self._loading is not None:
            self._loading.foresee((index,), self._assignments.waiting)

    def _hedge_instead(self, hedging: Hedging, part: BatchPart) -> BatchPart:
        """The parameters are those of the part, or of another one that the master wants to have computed before it: that one."""
        if self._assignments.was_abandoned(part.index):
            self._is_current = False
            return part
        hedge = hedging.pull(part.step)
        if hedge is not None:
            self._assignments.put_back(part.index)
            part = self._part = self._schedule.part(hedge)
            hedging.hold(part.step)
        self._is_current = hedging.held == part.step
        return part

    def weigh(self, loss: torch.Tensor, part: BatchPart, weight: float | None) -> torch.Tensor | None:
        """The mean loss of the part: the servers know what it counts in the step."""
        self._weight = weight
        self._model.refuse_changed()
        self._was_looked_at = True
        if self._local is not None:
            self._local.weigh(part, weight)
        self._look_whether_abandoned(part)
        if self._accumulation is not None:
            loss = self._accumulation.weigh(loss, part, weight)
        return None if weight == 0 or self._is_abandoned else loss

    def after(self, part: BatchPart) -> None:
        if self._local is not None:
            self._local.step()
        if self._accumulation is not None:
            self._accumulation.after(part)

    def complete(self) -> bool:
        """Pushes the gradient, and pulls the parameters for the next part if it is assigned already. Of weight 0: zeros."""
        part, client, again = self._part, self._client, self._again
        if self._hedging is not None:
            self._hedging.computed()
        self._look_whether_abandoned(part)
        if self._is_abandoned:
            self._gradients = None
            self._drop(part)
            return True
        if again is None:
            self._gradients, self._info = None, WHOLE
            learns = not part.samples or self._take_gradients()
        else:
            self._gradients, self._info, client.versions, learns = (
                again.gradients,
                again.info,
                again.versions,
                again.learns,
            )
        self._is_encoded = self._info.encoded
        try:
            self._hand_in(part)
        except PeerLost:
            if self._kept is not None:
                self._kept.keep(self._unconfirmed(learns))
            raise
        self._metrics.version = client.versions[0]
        self._watch.lap("communicate")
        self._finished(part, self._watch.now)
        return learns

    def _hand_in(self, part: BatchPart) -> None:
        client, replica = self._client, self._replica
        replica.leave_buffers(client, part, again=self._again is not None)
        self._is_encoded = True
        following = self._assignments.following
        if self._hedging is not None:
            if not client.push(part, self._gradients, self._info) and self._was_looked_at:
                self._loop.forget_last()
        elif following is None:
            client.push(part, self._gradients, self._info)
            self._is_current = False
        else:
            step = following // self._schedule.parts_per_step
            wanted = step if self._is_sync else None
            versions = client.push_pull(part, self._gradients, replica.staging.parameters, wanted, self._info)
            self._is_current = replica.took_over(versions, step)

    def _unconfirmed(self, learns: bool) -> Unconfirmed:
        """The push of the part was cut off."""
        return Unconfirmed(
            part=self._part,
            gradients=None if self._gradients is None else tuple(vector.clone() for vector in self._gradients),
            info=replace(self._info, encoded=self._is_encoded),
            versions=self._client.versions,
            learns=learns,
        )

    def step_done(self, *, reported: bool) -> None:
        """Tells the master which parts are done, at once when a checkpoint is due."""
        if reported and self._local is not None:
            self._metrics.gradient_norm, self._local.wants_norm = self._local.norm, True
        elif reported and self._gradients and not self._is_sync:
            # Sync: it is a part of the step's gradient, which no worker has.
            self._metrics.gradient_norm = norm(self._gradients)
        if reported or self._hedging is not None or (self._every and (self._part.step + 1) % self._every == 0):
            self._assignments.request(force=True)

    def _look_whether_abandoned(self, part: BatchPart) -> None:
        self._is_abandoned = self._is_abandoned or self._assignments.was_abandoned(part.index)

    def _drop(self, part: BatchPart) -> None:
        """Another worker has done the part: it does not count here."""
        if self._was_looked_at:
            self._loop.forget_last()
        self._watch.lap("communicate")
        self._finished(part, self._watch.now)

    def _take_gradients(self) -> bool:
        """Makes the gradient ready to be sent. False as of `complete`."""
        if self._local is not None:
            gradients, took_part, self._weight = self._local.change()
        else:
            gradients, took_part = self._model.gradients(), self._model.took_part
            if self._accumulation is not None:
                self._weight = self._accumulation.mean(gradients)
        if self._weight is not None or took_part is not None or self._sends_norm:
            runs = None if took_part is None else runs_of(self._model.places, took_part)
            self._info = GradientInfo(weight=self._weight, runs=runs, clips=self._sends_norm)
        self._gradients = self._replica.staging.gradients(gradients)
        self._watch.lap("backward")
        return self._weight == 0 or took_part is None or any(took_part)

    def _finished(self, part: BatchPart, now: float) -> None:
        self._assignments.finished(part.index, now - self._watch.began)
        self._on_part()

    def _next_assignment(self) -> int | None:
        """The next part; None when the round is over. Carries out the master's orders. A worker that waits leaves, and joins again."""
        control, member, assignments = self._control, self._member, self._assignments

        def something_new() -> bool:
            called = member.evaluate or member.save is not None or member.between is not None
            return called or assignments.following is not None or assignments.is_over

        while not assignments.is_over:
            if member.save is not None:
                self._save()
            if member.between is not None and self._evaluation is not None:
                self._evaluate_between(self._evaluation)
            assignments.request()
            if (index := assignments.take()) is not None:
                return index
            assignments.request(force=True)
            with control.changed:
                is_idle = not control.changed.wait_for(something_new, IDLE_SECONDS)
            if is_idle or member.evaluate:
                self._loop.report()  # the next wait may be long, and the parts that are computed would not be counted meanwhile
            if is_idle and self._hedging is not None and (index := self._hedging.idle(something_new)) is not None:
                return index
            if is_idle:
                if self._participates:
                    self._client.leave()
                self._participates = self._is_current = False
                # Others may compute what is left, evaluate it, or save it, for as long as that takes.
                control.wait(lambda: something_new() or None, what="more parts, or the end", timeout=None)
            with control.changed:  # an order of the next round must wait for it: this one's connections are closed
                evaluates = member.evaluate and not assignments.is_over
                member.evaluate = member.evaluate and not evaluates
            if evaluates:
                self._evaluate()
                self._participates = self._is_current = False
        return None

    def _evaluate_between(self, evaluation: ServedEvaluation) -> None:
        """The master's order, between two steps; no other worker waits for this one meanwhile."""
        self._loop.report()
        if self._participates:
            self._client.leave()
        self._participates = self._is_current = False
        if self._hedging is not None:
            self._hedging.forget()
        evaluation.run(self._client, self._assignments.round)
