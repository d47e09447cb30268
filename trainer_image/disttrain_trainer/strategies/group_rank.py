"""The role of a rank of a group that trains with parameter servers: strategy Hybrid with parameterServer (docs/design/0018).

The ranks of a group make a process group of their own, cut the model over it, and keep both while rounds of the servers come and go. When
one of them is lost, the others leave, and make another one with its replacement; the other groups go on.
"""

import os
import re
import time
from typing import Any

from disttrain.api.mesh import Coordinate, Mesh
from disttrain_trainer.data.inner_batches import Portions
from disttrain_trainer.errors import PeerLost, UserError, WrongInput
from disttrain_trainer.loop.meter import NonFiniteLoss
from disttrain_trainer.model import task as tasks
from disttrain_trainer.model import user_code
from disttrain_trainer.net import copies, transport
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.group_member import GroupMember
from disttrain_trainer.net.members import Round
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.parallel import shard_state
from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.parallel.mesh import Groups, mesh_of
from disttrain_trainer.parallel.process_group import group_at
from disttrain_trainer.parallel.traffic import Traffic
from disttrain_trainer.parameter_server.assignments import Assignments
from disttrain_trainer.parameter_server.client import ShardedClient
from disttrain_trainer.parameter_server.shares import RankShare
from disttrain_trainer.runtime import logs, machine
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.runtime.sockets import split_address
from disttrain_trainer.strategies import first_evaluation, group_buffers
from disttrain_trainer.strategies.group_evaluation import GroupEvaluation
from disttrain_trainer.strategies.group_exchange import GroupModel, GroupPushPull, PartNotFinite
from disttrain_trainer.strategies.group_models import GroupModels
from disttrain_trainer.strategies.group_orders import SIGN_OF_LIFE_SECONDS, Order, Orders
from disttrain_trainer.strategies.group_saving import GroupSaving
from disttrain_trainer.strategies.rank import MAX_BREAKS, PEER_LOSS_NOTICE_SECONDS
from disttrain_trainer.strategies.served_rounds import ServedRounds

log = logs.get_logger(__name__)


class GroupRank:
    """One rank of the job."""

    def __init__(self, *, process: Process, metrics: Metrics, control: ControlClient, member: GroupMember) -> None:
        self._process = process
        self._config = config = process.config
        self._metrics = metrics
        self._control = control
        self._member = member
        whole = mesh_of(config)
        at = whole.coordinate(process.rank)
        self._mesh = Mesh(pipeline=whole.pipeline, tensor=whole.tensor)
        """Of one group."""
        self._at = Coordinate(pipeline=at.pipeline, replicate=0, shard=0, tensor=at.tensor)
        self._place = self._mesh.rank(self._at)
        member.follows = self._place > 0
        self._transport = transport.of(config, process.tls_dir)
        with copies.kept(process, self._transport):
            self._task = task = tasks.build(
                config, rank=process.rank, local_rank=process.machine_rank, incarnation=process.incarnation
            )
            first_evaluation.attempt(task, process)
        shard_state.check(task.model)
        self._models = GroupModels(
            process=process, metrics=metrics, control=control, task=task, mesh=self._mesh, at=self._at
        )
        self._is_sync = config.strategy.synchronous
        self._backend = tasks.choose_backend(config, task.device)
        self._saving = GroupSaving(control=control, member=member, metrics=metrics, models=self._models)
        self._assignments = Assignments(control, member)
        self._own: GroupModel
        self._round_number = 0
        """The newest round that has begun here."""
        self._served = ServedRounds(control, member, timeout=config.startup_timeout_seconds)
        self._evaluation = GroupEvaluation(
            process=process, control=control, member=member, task=task, models=self._models, served=self._served
        )
        self._breaks: tuple[str, int] = ("", 0)
        self._traffic = Traffic()
        metrics.before_scrape = self._count

    def run(self) -> None:
        """Trains until the master says that the job is done. Raises TrainerError, or what the user's code raises."""
        with self._control.changed:
            self._member.data = self._task.data
            self._member.buffers = self._process.checkpoint_dir is not None
            self._member.keeps_model = self._evaluation.model_dir is not None
            self._member.ahead = self._task.loading.ahead if self._task.loading is not None else 0
        try:
            while (
                formation := self._member.await_group(self._control, timeout=self._config.startup_timeout_seconds)
            ) is not None:
                try:
                    self._work_in(formation)
                    return
                except BrokenGroup as error:
                    if self._control.finished:
                        return
                    log.warning("the group of worker-%d is over: %s", self._process.rank, error)
                    self._require_a_lost_peer(formation, error)
                    self._metrics.recoveries += 1
        finally:
            self._saving.wait()

    def _work_in(self, formation: str) -> None:
        """From a process group's begin to the end of the job. Raises BrokenGroup when one of its ranks is lost."""
        with group_at(
            self._config,
            control=self._control,
            member=self._member,
            is_over=lambda: self._member.formation != formation,
            prefix=f"group-{formation}",
            rank=self._place,
            size=self._mesh.size,
            backend=self._backend,
            traffic=self._traffic,
            transport=self._transport,
        ):
            try:
                groups = Groups.of(self._mesh, rank=self._place, device=self._task.device.type)
                orders = Orders(self._task.device)
            except RuntimeError as error:  # of gloo: a rank, or the master with the store, is lost meanwhile
                raise BrokenGroup(error) from None
            try:
                self._own = self._models.new(groups, orders)
                self._round_number = 0
                log.info("worker-%d is rank %d of %d of its group", self._process.rank, self._place, self._mesh.size)
                self._rounds(groups, orders)
            except (RuntimeError, WrongInput) as error:
                if self._has_ended(formation):
                    raise BrokenGroup(error) from None
                raise

    def _rounds(self, groups: Groups, orders: Orders) -> None:
        """One round of the servers after the other, until the job is done."""
        while True:
            if orders.leads:
                this_round = self._await_round(orders)
                if this_round is None:
                    orders.tell(Order.END)
                    return
                orders.tell(Order.ENTER)
            else:
                told = orders.hear()
                if told.order is Order.END:
                    return
                if told.order is Order.NOTHING:
                    continue
                this_round = None
            left_out = list(self._member.course.left_out)
            text = orders.share({"round": _text_of(this_round), "left_out": left_out} if this_round else None)
            self._task.schedule.without_parts = frozenset(text["left_out"])
            self._take_part_in(this_round or _round_of(text["round"]), groups, orders)

    def _await_round(self, orders: Orders) -> Round | None:
        """The first rank: the next round; None when the job is done."""
        control, member = self._control, self._member
        if not control.finished:
            member.get_ready(control)
        last = time.monotonic() + self._config.startup_timeout_seconds
        while True:
            with control.changed:
                control.changed.wait_for(lambda: control.finished or member.begun is not None, SIGN_OF_LIFE_SECONDS)
                if control.finished:
                    return None
                if member.begun is not None:
                    return member.begun
                control.check()
            if time.monotonic() > last:
                seconds = self._config.startup_timeout_seconds
                raise PeerLost("the parameter servers and the master", f"waited {seconds:g} s for a round")
            orders.tell(Order.NOTHING)

    def _take_part_in(self, this_round: Round, groups: Groups, orders: Orders) -> None:
        """Works with the servers until the round is over, on all ranks of the group alike."""
        client = ShardedClient(
            addresses=self._config.addresses.parameter_servers,
            config=self._config,
            rank=self._process.rank,
            incarnation=self._process.incarnation,
            round_number=this_round.number,
            timeout=self._config.peer_timeout_seconds,
            clock=self._served.clock if this_round.number == self._round_number else 0,
            total_steps=self._task.schedule.total_steps,
            groups=self._models.parameter_groups,
            primaries=this_round.primaries,
            transport=self._transport,
            share=RankShare(this_round.lease, self._mesh.size, self._own.values.strips),
        )
        with self._control.changed:
            self._member.connect(client, this_round.lease)
            if orders.leads and self._member.round is not this_round:
                client.close(goodbye=False)
        self._assignments.begin(this_round)
        try:
            self._enter(client, this_round, groups, orders)
            exchange = self._exchange(client, this_round, groups, orders)
            with user_code.refusing_groups("trainer.model"):
                self._models.loop.run(exchange)
        except NonFiniteLoss as error:
            self._control.send(MessageType.NAN, step=error.step)
            raise
        except PartNotFinite as error:
            self._go_back_or_fail(error, this_round, orders)
        except PeerLost as error:
            self._metrics.recoveries += 1
            if orders.leads:
                self._served.broke(this_round, error)
        finally:
            with self._control.changed:
                self._member.connect(None, "")
                self._served.left(client)
            client.close()

    def _go_back_or_fail(self, found: PartNotFinite, this_round: Round, orders: Orders) -> None:
        """On every rank: the loss is not finite. The rank that has computed it tells the master, which begins a round from the newest
        checkpoint, or raises the error."""
        control, each = self._control, self._config.parts_per_step
        goes_back: bool = orders.share(self._member.course.may_roll_back(self._config))
        step, parts = found.part.step, [found.part.index]
        if self._is_sync:
            (broken,) = orders.count(not self._own.model.is_finite())
            step = max(0, step - 1) if broken else step  # then the gradient of the step before was not
            parts = list(range(step * each, (step + 1) * each))
        if found.error is not None:
            control.send(MessageType.NAN, step=step, stay=this_round.lease, parts=parts)
            if not goes_back:
                raise found.error
            log.warning("%s; the training goes back to the newest checkpoint", found.error)
        while orders.leads:  # the others hear that nothing is to do
            with control.changed:
                is_over = control.changed.wait_for(
                    lambda: control.finished or self._member.round is not this_round, SIGN_OF_LIFE_SECONDS
                )
                control.check()
            if is_over:
                break
            orders.tell(Order.NOTHING)

    def _enter(self, client: ShardedClient, this_round: Round, groups: Groups, orders: Orders) -> None:
        """Connects, and sets parameters and buffers to the state of the round. Raises PeerLost."""

        def connect() -> float:
            client.connect(self._models.layout)
            return float(not client.initialized)

        # Asked of all: a rank that connects later may find that another group has given the servers their first parameters meanwhile.
        lacking = orders.together(connect)
        another = this_round.number != self._round_number
        resets = another and this_round.from_scratch and self._models.there_are_buffers
        if self._own.trained and (lacking or resets):
            # The values here contain the lost steps: to offer them to the servers would apply these steps twice.
            self._own = self._models.new(groups, orders)
        if lacking:

            def offer() -> float:
                client.initialize(self._own.values.parameters)
                return 0.0

            orders.together(offer)
        if another and (file := this_round.buffers) is not None:
            orders.together(lambda: self._restore(file, orders))
        if another:
            self._own.buffers.forget()
            self._evaluation.forget()
        self._round_number = this_round.number
        log.info("round %d begins with %d servers", this_round.number, self._config.parameter_servers)

    def _restore(self, file: str, orders: Orders) -> float:
        group_buffers.restore(self._own.model, self._process.checkpoint_dir, file)
        if orders.leads:
            self._models.whole.restore(file)
        return 0.0

    def _exchange(self, client: ShardedClient, this_round: Round, groups: Groups, orders: Orders) -> GroupPushPull:
        config, own, models = self._config, self._own, self._models
        return GroupPushPull(
            control=self._control,
            member=self._member,
            metrics=self._metrics,
            orders=orders,
            assignments=self._assignments,
            client=client,
            loop=models.loop,
            schedule=self._task.schedule,
            portions=Portions(config),
            own=own,
            groups=groups,
            plan_field=models.plan_field,
            computed_in=self._task.autocast.dtype,
            clips=config.trainer.max_gradient_norm is not None,
            goes_back=config.trainer.nan_policy is not None,
            is_sync=self._is_sync,
            every=config.checkpoint.every_steps if config.checkpoint else 0,
            save=lambda: self._saving.kept(client),
            collect=lambda: self._saving.collected(own, orders),
            between=lambda step: self._evaluation.between(own, client, this_round, orders, step),
            keep=lambda step: self._evaluation.keep(own, step),
            evaluate=lambda step: self._evaluation.run(own, client, this_round, orders, step),
            on_part=self._served.note_part,
            loading=self._task.loading,
        )

    def _has_ended(self, formation: str) -> bool:
        """Whether the master ended the process group, which it may do a moment after a peer's loss was seen here."""
        with self._control.changed:
            return self._control.changed.wait_for(
                lambda: self._member.formation != formation or self._control.finished, PEER_LOSS_NOTICE_SECONDS
            )

    def _require_a_lost_peer(self, formation: str, error: BrokenGroup) -> None:
        """Raises UserError when MAX_BREAKS process groups in a row break in the same way, and the master knows of no lost peer."""
        if self._has_ended(formation):
            self._breaks = ("", 0)
            return
        how = re.sub(r"\d+", "#", str(error))  # ports differ
        self._breaks = (how, self._breaks[1] + 1 if how == self._breaks[0] else 1)
        if self._breaks[1] == MAX_BREAKS:
            raise UserError(
                f"the connections between the processes of a group broke {MAX_BREAKS} times in a row while none was lost: {error}"
            )

    def _count(self) -> None:
        sent, received = self._served.bytes_moved()
        metrics = self._metrics
        metrics.bytes_sent, metrics.bytes_received = sent + self._traffic.sent, received + self._traffic.received


def _text_of(this_round: Round) -> dict[str, Any]:
    """What the other ranks need to know of it."""
    return {
        "number": this_round.number,
        "lease": this_round.lease,
        "buffers": this_round.buffers,
        "from_scratch": this_round.from_scratch,
        "primaries": list(this_round.primaries),
    }


def _round_of(text: dict[str, Any]) -> Round:
    return Round(**{**text, "primaries": tuple(text["primaries"])})


def run(process: Process, metrics: Metrics, control: ControlClient, member: GroupMember) -> None:
    """The role of a rank of a group."""
    machine.set_interface(os.environ, toward=split_address(process.config.addresses.rendezvous)[0])
    GroupRank(process=process, metrics=metrics, control=control, member=member).run()
