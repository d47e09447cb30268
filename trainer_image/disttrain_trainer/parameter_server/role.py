"""The role of a parameter server: shards, for which it carries out the master's orders one at a time.

Only checkpoints are made by threads of their own: a DROP must not wait for the disk, since all workers wait for the lost one. One of them
copies a shard; the other, of low priority, writes the copy while the training goes on.
"""

import queue
import threading
import time
from typing import Any

from disttrain_trainer.checkpoint.background import BackgroundWriter
from disttrain_trainer.checkpoint.store import shard_of
from disttrain_trainer.errors import UserError
from disttrain_trainer.net import transport
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.parameter_server import saving
from disttrain_trainer.parameter_server.saving import NotFinite
from disttrain_trainer.parameter_server.server import ShardServer
from disttrain_trainer.parameter_server.shard_file import ShardFile
from disttrain_trainer.runtime import in_place, logs
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.runtime.sockets import listening_host, split_address

log = logs.get_logger(__name__)


_A_SUM: Message = {"type": MessageType.NORM}
"""An order of this process: the sum of a step is whole, and the master needs its squares."""


class Server:
    """One parameter server. `describe` and `on_message` are the control thread's, `run` is the main thread's."""

    def __init__(self, process: Process, metrics: Metrics) -> None:
        config = process.config
        host, port = split_address(config.addresses.parameter_servers[process.index])
        self._process = process
        self._metrics = metrics
        self._orders: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        """Messages of the master, or the exception that ended the shard."""
        self._saves: queue.SimpleQueue[Message] = queue.SimpleQueue()
        """Checkpoints to be written."""
        self.server = ShardServer(
            config=config,
            index=process.index,
            host=listening_host(host),
            port=port,
            on_staleness=metrics.staleness.observe,
            on_failure=self._orders.put,
            on_sum=lambda: self._orders.put(_A_SUM),
            transport=transport.of(config, process.tls_dir),
        )
        metrics.before_scrape = self._count

    def describe(self) -> Message:
        """The fields of HELLO that tell a new master this server's state."""
        state = self.server.state()
        return {
            "generation": self.server.round_number,
            "applied": state.applied.intervals(),
            "ahead": state.ahead,
            "shards": [list(holding) for holding in self.server.holdings],
            **self._norms(),
        }

    def on_message(self, message: Message) -> None:
        """Queues an order of the master for `run`. Called by the control thread; does not block."""
        self._orders.put(message)

    def run(self, control: ControlClient) -> None:
        """Serves until the master says that the job is done.

        Raises WrongInput, PeerLost when the master is declared lost, or whatever a thread of the shard failed with.
        """
        self.server.start()
        threading.Thread(target=self._write, args=(control,), name="checkpoint", daemon=True).start()
        control.start()
        log.info("parameter-server-%d listens on %s", self._process.index, self.server.address)
        while True:
            in_place.own.step = self.server.newest_version
            try:
                order = self._orders.get(timeout=1)
            except queue.Empty:
                control.check()
                continue
            if isinstance(order, Exception):
                raise order
            if order["type"] == MessageType.FINISH:
                break
            self._obey(order, control)
        self.server.stop()

    def _obey(self, order: Message, control: ControlClient) -> None:
        match order["type"]:
            case MessageType.BEGIN:
                self._begin(int(order["generation"]), order["file"])
                control.send(MessageType.STATE, **self._state())
            case MessageType.STATE:
                control.send(MessageType.STATE, id=order["id"], **self._state())
            case MessageType.DROP:
                for rank in order["ranks"]:
                    self.server.drop(int(rank))
                control.send(MessageType.STATE, id=order["id"], **self._state())
            case MessageType.NORM if order is _A_SUM:
                control.send(MessageType.NORM, generation=self.server.round_number, norms=self.server.norm_parts())
            case MessageType.NORM:
                self.server.take_norm(int(order["generation"]), int(order["version"]), float(order["norm"]))
            case MessageType.SAVE:
                self._saves.put(order)
            case MessageType.NAN:
                raise UserError(order["reason"])  # the master's answer where no roll-back is left
            case MessageType.PROMOTE:
                self.server.promote([(int(shard), int(term)) for shard, term in order["shards"]])
                control.send(MessageType.STATE, **self._state())
            case MessageType.DISCARD:
                self.server.discard([(int(shard), int(term)) for shard, term in order["shards"]])
            case MessageType.REPLICATE:
                self._replicate(int(order["shard"]), order["server"], control)

    def _replicate(self, shard: int, server: int | None, control: ControlClient) -> None:
        if server is None:
            self.server.stop_copying(shard)
            return

        def changed(term: int, complete: bool) -> None:
            copy = {"shard": shard, "term": term, "server": server, "complete": complete}
            control.send(MessageType.COPY, generation=round_number, **copy)

        round_number = self.server.round_number
        address = self._process.config.addresses.parameter_servers[server]
        self.server.replicate(shard, server, address, changed)

    def _begin(self, round_number: int, file: str | None) -> None:
        """Begins a round; an order for a round that has begun already, of a master that is lost, is ignored."""
        if round_number <= self.server.round_number:
            log.info("round %d has begun already", round_number)
            return
        root = self._process.checkpoint_dir
        path = root / file if root is not None and file is not None else None
        self.server.begin(round_number, path)
        log.info("round %d begins from %s", round_number, file or "the first worker's parameters")

    def _state(self) -> dict[str, Any]:
        state = self.server.state()
        return {
            "generation": self.server.round_number,
            "applied": state.applied.intervals(),
            "ahead": state.ahead,
            "shards": [list(holding) for holding in self.server.holdings],
            "max_staleness_seen": state.max_staleness_seen,
            "staleness": state.staleness,
            "gradient_norms": state.gradient_norms,
            **self._norms(),
        }

    def _norms(self) -> dict[str, Any]:
        parts = self.server.norm_parts()
        return {"norms": parts} if parts else {}

    def _write(self, control: ControlClient) -> None:
        """The thread that makes checkpoints, one after the other."""
        writer = BackgroundWriter()
        while True:
            order = self._saves.get()
            try:
                self._save(order, control, writer)
            except NotFinite as error:
                self._not_finite(f"{error} at step {order['step']}", order, control)
            except Exception as error:
                self._orders.put(error)

    def _not_finite(self, what: str, order: Message, control: ControlClient) -> None:
        """The step before a checkpoint had a gradient that is not finite.

        Sync with trainer.nanPolicy: which parts the step had is known, and the master decides. It begins a round from an older checkpoint
        without them, or answers that the job fails.
        """
        config, step = self._process.config, int(order["step"])
        reason = f"{what}: lower trainer.optimizer.learningRate; no checkpoint of it is written"
        if config.trainer.nan_policy is None or not config.strategy.synchronous:
            control.send(MessageType.NAN, step=step)
            self._orders.put(UserError(reason))
            return
        each = config.parts_per_step
        parts = list(range((step - 1) * each, step * each))
        control.send(MessageType.NAN, id=order["id"], step=step - 1, parts=parts, reason=reason)

    def _save(self, order: Message, control: ControlClient, writer: BackgroundWriter) -> None:
        """Copies the shards that this server serves, tells the master that the training may go on, and writes the copies. Raises
        NotFinite."""
        save, root, began = order["id"], self._process.checkpoint_dir, time.perf_counter()
        shards = self.server.primaries
        if root is None:
            self._cannot_save(control, save, "it has no checkpoint volume")
            return
        try:
            step, wanted = order["step"], self._saves.empty  # a later order is of a master that knows more
            copies = [(shard, self.server.snapshot(shard, step=step, wanted=wanted)) for shard in shards]
        except RuntimeError as error:
            self._cannot_save(control, save, str(error))
            return
        for shard in shards:
            control.send(MessageType.COPIED, id=save, shard=shard)

        def write() -> None:
            for shard, copy in copies:
                try:
                    self._write_one(control, order, shard, copy)
                except OSError as error:
                    self._cannot_save(control, save, str(error))
                    return
            self._metrics.checkpoint_seconds.observe(time.perf_counter() - began)

        writer.start(write)
        writer.wait()
        writer.check()

    def _write_one(self, control: ControlClient, order: Message, shard: int, copy: ShardFile) -> None:
        """Writes a shard's file. Raises OSError, NotFinite."""
        root, save = self._process.checkpoint_dir, order["id"]
        assert root is not None
        file = f"{shard_of(shard)}{save}.safetensors"
        saved = saving.write(copy, root / order["folder"] / file)
        parts = saved.applied.intervals()
        control.send(MessageType.SAVED, id=save, shard=shard, file=file, digest=saved.digest, applied=parts)

    def _cannot_save(self, control: ControlClient, save: str, why: str) -> None:
        control.send(MessageType.SAVED, id=save, error=why)

    def _count(self) -> None:
        state, metrics = self.server.state(), self._metrics
        metrics.version, metrics.late_gradients = state.version, state.late_gradients
        metrics.bytes_received, metrics.bytes_sent = state.bytes_in, state.bytes_out
