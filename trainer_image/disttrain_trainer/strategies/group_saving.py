"""What a rank of a group writes for a checkpoint of the servers: the buffers, which its first rank has or collects."""

import time

from disttrain_trainer.checkpoint.background import BackgroundWriter
from disttrain_trainer.checkpoint.store import step_of
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.group_member import GroupMember
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.parameter_server.client import ShardedClient
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.strategies.group_exchange import GroupModel
from disttrain_trainer.strategies.group_models import GroupModels
from disttrain_trainer.strategies.group_orders import Orders

log = logs.get_logger(__name__)


class GroupSaving:
    """Carries out the master's orders to save. For the training thread."""

    def __init__(self, *, control: ControlClient, member: GroupMember, metrics: Metrics, models: GroupModels) -> None:
        self._control = control
        self._member = member
        self._metrics = metrics
        self._models = models
        self._writer = BackgroundWriter()
        control.before_release = self._writer.wait

    def wait(self) -> None:
        """Until all is written: without these buffers the servers' shards of a step make no checkpoint."""
        self._writer.wait()

    def kept(self, client: ShardedClient) -> None:
        """Sync: the first rank saves the buffers of a step, which the servers have. Raises PeerLost."""
        with self._control.changed:
            save, self._member.save = self._member.save, None
        if save is None:
            return
        if self._models.there_are_buffers:
            found = client.fetch_buffers(step_of(save.folder))
            if found is None:
                log.warning("%s has the buffers of a later step", save.folder)
            elif found:
                self._models.whole.put_encoded(found)
        self._write(save.id, save.folder)

    def collected(self, own: GroupModel, orders: Orders) -> None:
        """Otherwise each group has buffers of its own."""
        found = own.buffers.collect()
        with self._control.changed:
            save, self._member.save = self._member.save, None
        if orders.leads and save is not None:
            self._models.whole.put(found)
            self._write(save.id, save.folder)

    def _write(self, number: str, folder: str) -> None:
        self._writer.wait()
        self._writer.check()
        began = time.perf_counter()
        write = self._models.whole.save(folder)
        self._control.send(MessageType.COPIED, id=number)
        self._writer.start(lambda: self._control.send(MessageType.SAVED, id=number, **write()))
        self._metrics.phase_seconds["checkpoint"] += time.perf_counter() - began
