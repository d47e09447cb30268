"""The primary's end of the connection to the copy of a shard: a thread that sends the snapshot, and then record after record."""

import json
import threading
from collections.abc import Callable, Sequence

from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint.background import HostCopy
from disttrain_trainer.model.flat import bytes_of
from disttrain_trainer.net.connection import Closed, Silent
from disttrain_trainer.net.frames import NORM, PARTIAL, RUN, SCALES, Header, Link, Op, ProtocolError, Refusal
from disttrain_trainer.net.transport import Transport
from disttrain_trainer.parameter_server.following import Follow
from disttrain_trainer.parameter_server.identity import HelloVector, config_digest
from disttrain_trainer.parameter_server.participation import Took
from disttrain_trainer.parameter_server.replicated_host import ReplicatedHost, Snapshot
from disttrain_trainer.parameter_server.update_log import Record, UpdateLog
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

LOOK_SECONDS = 0.5
"""Seconds between two looks at whether an idle copy is still there."""


class CopySender:
    """Keeps the copy of a shard on another server, until the connection breaks or `stop` is called. `start` once.

    changed: called in the thread with True when the copy is complete, and with False when it is lost, before a worker can hear of an
    update that it does not have; not after `stop`.
    """

    def __init__(
        self,
        host: ReplicatedHost,
        *,
        shard: int,
        config: JobConfig,
        own: int,
        server: int,
        address: str,
        transport: Transport,
        changed: Callable[[bool], None],
    ) -> None:
        """own, server: numbers of the primary's server and of the copy's. address: of that one, host:port."""
        self._host = host
        self._shard = shard
        self._config = config
        self._own = own
        self._server = server
        self._address = address
        self._transport = transport
        self._on_change = changed
        self._link: Link | None = None
        self._log = host.new_log()
        self._stopped = threading.Event()
        self.bytes_sent = 0

    def start(self) -> None:
        threading.Thread(target=self._run, name=f"copy-{self._shard}", daemon=True).start()

    def stop(self) -> None:
        """No copy is wanted there any more: no worker waits for it. Any thread may call this."""
        self._stopped.set()
        self._host.end_log(self._log)
        if self._link is not None:
            self._link.abort()

    def _run(self) -> None:
        try:
            why = self._copy()
            if not self._stopped.is_set():
                log.warning("the copy of shard %d on parameter-server-%d is lost: %s", self._shard, self._server, why)
                self._on_change(False)
        finally:  # else all workers would wait for a copy that gets nothing more
            self._host.end_log(self._log)

    def _copy(self) -> str:
        """Keeps the copy; returns why it ended."""
        try:
            self._host.await_parameters(self._log)
            # Before the log begins: workers wait for no server that does not answer.
            link = self._link = Link(self._transport.dial(self._address, timeout=self._config.peer_timeout_seconds))
            try:
                snapshot = self._host.begin_log(self._log, HostCopy())
                self._introduce(link, snapshot)
                del snapshot
                self._serve(link, self._log)
            finally:
                link.abort()
                link.close()
        except (Closed, Silent, ProtocolError, OSError, Refusal) as error:
            return str(error)
        except Exception as error:
            log.exception("the copy of shard %d cannot be kept", self._shard)
            return str(error)
        return "it is not wanted any more"

    def _serve(self, link: Link, log_of_updates: UpdateLog) -> None:
        self._await_done(link)
        while not self._stopped.is_set():
            record = self._host.next_record(log_of_updates, LOOK_SECONDS)
            if record is None:
                if link.hung_up:
                    raise Closed("closed by the peer")
                continue
            if link.spent:
                link.send(Header(op=Op.RENEW))
                self._await_done(link)
                link.renew(within=self._config.peer_timeout_seconds)
            _send(link, record)
            self._await_done(link)
            self.bytes_sent = link.sent
            self._host.copied(log_of_updates)
            if record.complete and not self._stopped.is_set():
                self._on_change(True)
                log.info("shard %d has a copy on parameter-server-%d", self._shard, self._server)

    def _introduce(self, link: Link, snapshot: Snapshot) -> None:
        file, kept, first, norm = snapshot
        tensors = {name: file.tensors[name] for name in sorted(file.tensors)}
        follow = Follow.model_validate(
            {
                "job_uid": self._config.uid,
                "config_digest": config_digest(self._config),
                "attempt": self._config.attempt,
                "round_number": self._host.number,
                "shard": self._shard,
                "shards": self._config.parameter_servers,
                "server": self._own,
                "term": self._host.term,
                "layout_digest": file.layout.digest,
                "vectors": [
                    HelloVector.model_validate({"dtype": v.dtype, "length": v.length}) for v in file.layout.vectors
                ],
                "version": file.version,
                "first": first,
                "norm": norm,
                "applied": file.applied.intervals(),
                "groups": self._host.groups,
                "optimizer": file.optimizer,
                "updates": file.updates,
                "missed": file.missed,
                "tensors": [
                    {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "length": tensor.numel()}
                    for name, tensor in tensors.items()
                ],
                "kept": len(kept),
            }
        )
        data = json.dumps(follow.model_dump(mode="json")).encode()
        link.send(Header(op=Op.FOLLOW, nbytes=len(data)), [memoryview(data)])
        views = [bytes_of(tensor) for tensor in tensors.values() if tensor.numel()]
        link.send(Header(op=Op.INIT, nbytes=sum(map(len, views))), views)
        for step, buffers in sorted(kept.items()):
            link.send(Header(op=Op.KEEP, step=step, nbytes=len(buffers)), [memoryview(buffers)])

    def _await_done(self, link: Link) -> None:
        header = link.receive()
        if header.op is Op.REFUSED:
            raise Closed(link.receive_text(header).decode(errors="replace"))
        if header.op is not Op.DONE:
            raise ProtocolError(f"answered {header.op.name}, not DONE")


def _send(link: Link, record: Record) -> None:
    if record.complete:
        link.send(Header(op=Op.COMPLETE))
    elif record.kept is not None:
        step, buffers = record.kept
        link.send(Header(op=Op.KEEP, step=step, nbytes=len(buffers)), [memoryview(buffers)])
    elif record.parts is not None:
        first, stop = record.parts
        runs = _runs(record.took)
        payload: Sequence[memoryview] = ()
        if record.gradient is not None:
            head = SCALES.pack(record.scale, record.rate) + b"".join(RUN.pack(*run) for run in runs or ())
            payload = [memoryview(head), *record.gradient.views]
        link.send(
            Header(
                op=Op.UPDATE,
                code=(PARTIAL if runs is not None else 0) | (NORM if record.norm is not None else 0),
                weight=record.norm or 0.0,
                samples=stop - first,
                index=first,
                runs=len(runs or ()),
                nbytes=sum(map(len, payload)),
            ),
            payload,
        )


def _runs(took: Took) -> list[tuple[int, int, int]] | None:
    """The elements of a step as runs; None for all of them."""
    if took is None:
        return None
    return [(vector, start, stop) for vector, part in enumerate(took) for start, stop in part]
