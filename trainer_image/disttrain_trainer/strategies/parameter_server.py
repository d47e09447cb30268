"""The role of a worker of parameter servers: it gets parts from the master, computes their gradients and exchanges them with the servers.

The control thread receives assignments while the main thread computes, so that no step waits for the master. When a peer is lost, the
worker leaves the round and asks for the next one; the servers know which parts count.
"""

import time
from typing import Any

import torch
from torch import nn

from disttrain_trainer.checkpoint import by_name, final, model_file, origin
from disttrain_trainer.checkpoint.background import BackgroundWriter
from disttrain_trainer.checkpoint.buffers import Buffers
from disttrain_trainer.checkpoint.store import step_of
from disttrain_trainer.data.schedule import BatchPart
from disttrain_trainer.errors import PeerLost
from disttrain_trainer.loop.meter import Meter, NonFiniteLoss
from disttrain_trainer.model import task as tasks
from disttrain_trainer.model import user_code
from disttrain_trainer.model.flat import FlatModel, norm, runs_of
from disttrain_trainer.model.initial import InitialParameters
from disttrain_trainer.model.part_buffers import PartBuffers
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import ParameterServerMember, Round
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.parameter_server.client import WHOLE, GradientInfo, ShardedClient
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process

log = logs.get_logger(__name__)

IDLE_SECONDS = 0.02
"""Seconds without an assignment after which a worker leaves, so that no other worker waits for it."""
RETRY_SECONDS = 0.2
"""Seconds before a worker asks for another round when one broke and the master did not end it."""


class Worker:
    """One worker of the job."""

    def __init__(
        self, *, process: Process, metrics: Metrics, control: ControlClient, member: ParameterServerMember
    ) -> None:
        self._process = process
        self._config = process.config
        self._metrics = metrics
        self._control = control
        self._member = member
        self._sync = process.config.strategy.synchronous
        self._task = tasks.build(
            self._config, rank=process.rank, local_rank=process.machine_rank, incarnation=process.incarnation
        )
        self._objective = tasks.Objective(self._task.model, self._task.loss)
        self._start = origin.taken(process.checkpoint_dir, self._config) if process.checkpoint_dir else None
        """The checkpoint of another job that the training starts with."""
        self._load_start(self._task.model)
        self._flat = FlatModel(self._task.model)
        self._buffers = Buffers(self._task.model, process.checkpoint_dir, self._flat.described())
        self._writer = BackgroundWriter()
        self._keeps_model = process.model_dir is not None and model_file.can_be_kept(self._task.model)
        self._first = InitialParameters(self._config, self._flat.parameters, prepare=self._load_start)
        parts = PartBuffers(self._task.model)
        self._parts = parts if self._sync and parts.there_are_some else None
        """Sync: the buffers of each step, which the first server keeps."""
        self._buffers_step: int | None = None
        """The step whose buffers `_parts` holds."""
        self._left_for: int | None = None
        """The step that starts from what this worker's part 0 left."""
        self._trained = False
        """Whether parameters and buffers are no longer those of a new model."""
        self._round_number = 0
        """That of the buffers, and of the clock."""
        self._clock = 0
        """Iterations completed in this round."""
        # On a GPU the network gets copies in the host's memory; on the CPU it shares the model's own.
        self._on_gpu = self._task.device.type == "cuda"
        self._parameters = self._host_copies() if self._on_gpu else self._flat.parameters
        self._gradients = self._host_copies() if self._on_gpu else ()
        self._meter = Meter(
            name=process.name,
            metrics=metrics,
            total_steps=self._task.schedule.total_steps,
            send=lambda fields: control.send(MessageType.REPORT, **fields),
        )
        self._every = process.config.checkpoint.every_steps if process.config.checkpoint else 0
        self._done: list[int] = []
        """Parts that every server applied and that are not reported to the master yet."""
        self._newest: BatchPart | None = None
        """What was computed last."""
        self._seconds = 0.0
        """Mean duration of a part, lately."""
        self._moved = time.monotonic()
        """When a part was last done."""
        self._moved_bytes = (0, 0)
        """Sent and received by connections that are closed."""
        metrics.before_scrape = self._count

    def _load_start(self, model: nn.Module) -> None:
        if self._start is not None:
            by_name.load_model(self._start.folder, model, source=self._start.of)

    def run(self) -> None:
        """Works until the master says that the job is done. Raises TrainerError, or what the user's code raises."""
        control, member = self._control, self._member
        with control.changed:
            member.data = self._task.data
            member.buffers = self._process.checkpoint_dir is not None
            member.keeps_model = self._keeps_model
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
            clock=self._clock if this_round.number == self._round_number else 0,
        )
        with self._control.changed:
            if self._member.round is not this_round:
                return
            self._member.client = client
        # The servers may have gone back to a checkpoint; if they have not, they report the applied parts to the master themselves.
        self._done.clear()
        try:
            client.connect(self._flat.layout)
            self._begin(client, this_round)
            log.info("round %d begins with %d servers", this_round.number, self._config.parameter_servers)
            with user_code.refusing_groups("trainer.model"):
                self._work(client, this_round)
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

    def _begin(self, client: ShardedClient, this_round: Round) -> None:
        """Sets parameters and buffers to the state of the round: this worker may be new, or the servers went back to a checkpoint."""
        another = this_round.number != self._round_number
        reset_buffers = another and this_round.from_scratch and self._buffers.there_are_some
        if self._trained and (reset_buffers or not client.initialized):
            # The worker's parameters contain the lost steps: to offer them to the servers would apply these steps twice.
            self._buffers.reset(self._first.restore(self._flat.parameters))
            if self._on_gpu:
                for host, device in zip(self._parameters, self._flat.parameters, strict=True):
                    host.copy_(device)
            self._trained = False
        if not client.initialized:
            client.initialize(self._parameters)
        if another and this_round.buffers is not None:
            self._buffers.restore(this_round.buffers)
        if another:
            self._buffers_step = self._left_for = None
        self._round_number = this_round.number

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

    def _work(self, client: ShardedClient, this_round: Round) -> None:
        task, member, metrics = self._task, self._member, self._metrics
        phases, clock = metrics.phase_seconds, time.perf_counter
        self._meter.begin(clock())
        participates = current = False
        """Whether this worker counts in the clocks, and whether the parameters are those of the next part."""
        while (index := self._next_assignment(client, this_round, participates)) is not None:
            if index < 0:
                participates = current = False
                continue
            began = clock()
            part = task.schedule.part(index)
            if not participates:
                self._trained = True
                client.join()
                participates = True
            if not current:
                current = self._received(client.pull(self._parameters, step=part.step if self._sync else None), part)
            current = current and (self._parts is None or self._take_buffers(self._parts, client, part.step))
            pulled = clock()
            if not current:
                self._finished(index, pulled - began)  # its step is over: another worker computed the part
                continue
            gradients, info = self._compute(part, pulled) if part.samples else (None, WHOLE)
            computed = clock()
            if self._parts is not None:
                self._leave_buffers(self._parts, client, part)
            following = member.assignments[0] if member.assignments else None
            if following is None:
                client.push(part, gradients, info)
                current = False
            else:
                after = task.schedule.part(following)
                step = after.step if self._sync else None
                current = self._received(client.push_pull(part, gradients, self._parameters, step, info), after)
            now = clock()
            self._newest = part
            phases["communicate"] += (pulled - began) + (now - computed)
            metrics.version = client.versions[0]
            self._finished(index, now - began)
            metrics.steps += 1
            metrics.step_seconds.observe(now - began)
            if self._meter.due(now):
                self._flat.verify()
                user_code.keep_sigterm("the code of trainer.loss, trainer.model or trainer.dataset")
                if gradients and not self._sync:
                    # Sync: it is a part of the step's gradient, which no worker has.
                    metrics.gradient_norm = norm(gradients)
                self._report()
                self._request(this_round, force=True)
            elif self._every and (part.step + 1) % self._every == 0:
                self._request(this_round, force=True)  # a checkpoint is due: the master should know at once
        self._report()

    def _take_buffers(self, parts: PartBuffers, client: ShardedClient, step: int) -> bool:
        """Sync: makes the model's buffers those of a step. False when a later step has taken its place."""
        if self._buffers_step == step:
            parts.restore()
            return True
        if self._left_for == step:
            parts.advance()
        else:
            found = client.fetch_buffers(step)
            if found is None:
                return False
            if found:
                parts.take(found)
        parts.begin()
        self._buffers_step = step
        return True

    def _leave_buffers(self, parts: PartBuffers, client: ShardedClient, part: BatchPart) -> None:
        """Sync: after a part. What part 0 leaves goes to the servers before its gradient, which may complete the step."""
        number = part.index % self._config.parts_per_step
        parts.left(step=part.step, part=number)
        if not number:
            client.keep_buffers(part.step, parts.encoded())
            self._left_for = part.step + 1

    def _report(self) -> None:
        """Reports what was computed since the last report."""
        if (part := self._newest) is not None:
            self._meter.report(step=part.step + 1, epoch=part.epoch, now=time.perf_counter())

    def _compute(self, part: BatchPart, began: float) -> tuple[tuple[torch.Tensor, ...], GradientInfo]:
        """The gradient of the part's mean loss, in memory that the network may read, and what it is of. Of weight 0: zeros."""
        task, phases, clock = self._task, self._metrics.phase_seconds, time.perf_counter
        task.seed(part)
        batch = task.fetch(part.indices)
        fetched = clock()
        self._flat.zero_grad()
        loss, weight = self._objective(batch)
        value = loss.item()
        if weight != 0:
            self._meter.check(value, step=part.step)
        self._meter.add(part, loss=value, weight=weight)
        self._flat.refuse_unfrozen()
        self._flat.refuse_changed()
        forwarded = clock()
        if weight != 0:
            loss.backward()  # type: ignore[no-untyped-call]
        gradients, took = self._flat.gradients(), self._flat.took_part
        if took is not None and weight != 0 and not any(took):
            self._objective.learned_nothing()
        info = WHOLE
        if weight is not None or took is not None:
            info = GradientInfo(weight=weight, runs=None if took is None else runs_of(self._flat.places, took))
        if self._on_gpu:
            for host, device in zip(self._gradients, gradients, strict=True):
                host.copy_(device)
            gradients = self._gradients
        phases["data"] += fetched - began
        phases["forward"] += forwarded - fetched
        phases["backward"] += clock() - forwarded
        return gradients, info

    def _received(self, versions: tuple[int, ...], part: BatchPart) -> bool:
        """Whether the parameters that came are good for this part. Sync: exactly those of its step."""
        if self._on_gpu:
            for host, device in zip(self._parameters, self._flat.parameters, strict=True):
                device.copy_(host)
        return not self._sync or all(version == part.step for version in versions)

    def _finished(self, index: int, seconds: float) -> None:
        self._done.append(index)
        self._moved = time.monotonic()
        self._seconds += (seconds - self._seconds) * 0.1 if self._seconds else seconds

    def _request(self, this_round: Round, *, force: bool = False) -> None:
        """Reports the parts that are done, and requests more when half of the wanted assignments are used up."""
        member = self._member
        count = member.parts_to_request(self._seconds)
        if count or (force and self._done):
            with self._control.changed:
                if member.round is not this_round:
                    return  # the master ignores a request of an earlier lease, and in the next round it would count as made
                member.asked = member.asked or count > 0
            done, self._done = self._done, []
            self._control.send(MessageType.REQUEST, stay=this_round.lease, count=count, done=done)

    def _next_assignment(self, client: ShardedClient, this_round: Round, participates: bool) -> int | None:
        """The next part; None when the round is over; -1 when the worker waited, and must join and pull again."""
        control, member = self._control, self._member
        if member.round is not this_round:
            return None
        if member.save is not None:
            self._save_buffers(client)
        self._request(this_round)
        try:
            return member.assignments.popleft()
        except IndexError:
            pass
        self._request(this_round, force=True)

        def something_new() -> bool:
            called = member.evaluate or member.save is not None
            return called or bool(member.assignments) or member.round is not this_round

        with control.changed:
            idle = not control.changed.wait_for(something_new, IDLE_SECONDS)
        if idle or member.evaluate:
            self._report()  # the next wait may be long, and the parts that are computed would not be counted meanwhile
        if idle:
            if participates:
                client.leave()
            # Others may compute what is left, evaluate it, or save it, for as long as that takes.
            control.wait(lambda: something_new() or None, what="more parts, or the end", timeout=None)
        if member.save is not None and not idle:
            return self._next_assignment(client, this_round, participates)
        with control.changed:  # an order of the next round must wait for it: this one's connections are closed
            if member.round is not this_round:
                return None
            evaluates, member.evaluate = member.evaluate, False
        if evaluates:
            self._evaluate(client, this_round)
        return -1 if idle or not member.assignments else member.assignments.popleft()

    def _save_buffers(self, client: ShardedClient) -> None:
        with self._control.changed:
            save, self._member.save = self._member.save, None
        if save is None:
            return
        if self._parts is not None and not self._take_buffers(self._parts, client, step_of(save.folder)):
            log.warning("%s has the buffers of a later step", save.folder)
        self._writer.wait()
        self._writer.check()
        began = time.perf_counter()
        write = self._buffers.save(save.folder)
        self._control.send(MessageType.COPIED, id=save.id)
        self._writer.start(lambda: self._control.send(MessageType.SAVED, id=save.id, **write()))
        self._metrics.phase_seconds["checkpoint"] += time.perf_counter() - began

    def _evaluate(self, client: ShardedClient, this_round: Round) -> None:
        """All parts are applied: sends the master the result of the user's `evaluate` on the final parameters, and their file.

        The file is written first: an evaluation that fails, or that changes the model, must not cost the training.
        """
        self._trained = True
        client.join()
        client.pull(self._parameters, step=self._task.schedule.total_steps if self._sync else None)
        if self._parts is not None:
            self._take_buffers(self._parts, client, client.versions[0])
        client.leave()
        if self._on_gpu:
            for host, device in zip(self._parameters, self._flat.parameters, strict=True):
                device.copy_(host)
        found: dict[str, object] = {}
        if self._keeps_model and not self._write_model(this_round, found):
            return
        if self._task.evaluate is not None:
            found["evaluation"] = self._task.evaluate()
        self._control.send(MessageType.EVALUATED, stay=this_round.lease, **found)

    def _write_model(self, this_round: Round, found: dict[str, object]) -> bool:
        """Writes the model, and adds where it is to what is found. False when the round is over before it can be written.

        Raises Unsaved when it fails for too long.
        """
        folder, control, member = self._process.model_dir, self._control, self._member
        assert folder is not None

        def attempt() -> str | None:
            try:
                found["model"] = model_file.write(self._task.model, folder).to_dict()
            except OSError as error:
                log.error("the model was not written: %s; it is tried again in %g s", error, final.RETRY_SECONDS)
                return str(error)
            return None

        def over(seconds: float) -> bool:
            with control.changed:
                control.changed.wait_for(lambda: member.round is not this_round, seconds)
            control.check()
            return member.round is not this_round

        return final.insist("model", self._task.schedule.total_steps, attempt, over=over)

    def _host_copies(self) -> tuple[Any, ...]:
        return tuple(vector.to("cpu", copy=True).pin_memory() for vector in self._flat.parameters)


def run(process: Process, metrics: Metrics, control: ControlClient, member: ParameterServerMember) -> None:
    """The role of a worker of parameter servers."""
    Worker(process=process, metrics=metrics, control=control, member=member).run()
