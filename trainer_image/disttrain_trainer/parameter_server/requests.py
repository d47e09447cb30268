"""The requests of one connection to a server: read, passed to the shard's host, answered."""

import math
from collections.abc import Sequence

from disttrain_trainer.net.connection import Closed
from disttrain_trainer.net.frames import (
    BFLOAT16,
    LATE,
    MAX_BUFFERS,
    MAX_RUNS,
    MAX_SHARE,
    NORM,
    NOT_YET,
    OWN_WEIGHT,
    PARTIAL,
    PATIENT,
    RUN,
    SPARSE,
    Header,
    Link,
    Op,
    ProtocolError,
)
from disttrain_trainer.parameter_server import compression
from disttrain_trainer.parameter_server.assembly import Pushed
from disttrain_trainer.parameter_server.participation import Took, took_of
from disttrain_trainer.parameter_server.sessions import Gradient, Session, Waiting
from disttrain_trainer.parameter_server.shard import Buffers
from disttrain_trainer.parameter_server.shard_host import ShardHost
from disttrain_trainer.parameter_server.shares import PackedShare, RankShare


class Requests:
    """The requests of one connection, answered one after the other."""

    def __init__(
        self,
        *,
        link: Link,
        host: ShardHost,
        session: Session,
        timeout_seconds: float,
        heartbeat_seconds: float,
        members: int,
    ) -> None:
        """members: ranks of a group."""
        self._link = link
        self._host = host
        self._session = session
        self._members = members
        self._waiting = Waiting(
            timeout_seconds=timeout_seconds, heartbeat_seconds=heartbeat_seconds, still_waiting=self._still_waiting
        )

    def serve(self) -> bool:
        """Blocks, and answers requests until BYE: True. Raises Silent, Closed, ProtocolError, Refusal."""
        while True:
            header = self._link.receive(patient=True)
            match header.op:
                case Op.SHARE:
                    self._take_share(header)
                case Op.INIT:
                    self._initialize(header)
                case Op.JOIN:
                    self._done(clock=self._host.join(self._session, header.clock))
                case Op.LEAVE:
                    self._host.leave(self._session)
                    self._done()
                case Op.PUSH:
                    pushed = self._push(header)
                    self._host.settle(self._waiting)
                    self._done(version=pushed.version, code=LATE if pushed.late else 0)
                case Op.PULL:
                    self._pull(header.clock, header.step, self._patience(header))
                case Op.PUSH_PULL:
                    self._push(header)
                    self._pull(header.clock + 1, header.step)
                case Op.KEEP:
                    data = self._link.receive_bytes(header, most=MAX_BUFFERS)
                    self._host.keep(self._session, header.step, data)
                    self._host.settle(self._waiting)
                    self._done()
                case Op.FETCH:
                    found = self._host.kept(self._session, header.step)
                    nbytes = len(found or b"")
                    kept = Header(op=Op.KEPT, code=found is not None, nbytes=nbytes)
                    self._link.send(kept, [memoryview(found)] if found else [])
                case Op.RENEW:
                    self._done()
                    self._link.renew(within=self._waiting.timeout_seconds)
                case Op.BYE:
                    return True
                case _:
                    raise ProtocolError(f"{header.op.name} is not for a server")

    def _done(self, *, code: int = 0, clock: int = 0, version: int = 0) -> None:
        self._link.send(Header(op=Op.DONE, code=code, clock=clock, version=version))

    def _take_share(self, header: Header) -> None:
        """What comes and goes from here on is the share, of a text without strips the whole shard."""
        data = self._link.receive_bytes(header, most=MAX_SHARE)
        spans = self._host.spans
        lengths = [span.length for span in spans]
        found = RankShare.decode(data, lengths, members=self._members) if data else None
        self._session.share = None if found is None else PackedShare(found, spans)
        self._done()

    def _initialize(self, header: Header) -> None:
        if (share := self._session.share) is not None:
            self._link.receive_into(header, share.views)
            self._done(code=self._host.assemblies.initialize(self._session, share))
            return
        buffers = self._host.take()
        self._link.receive_into(header, buffers.views)
        self._done(code=self._host.initialize(buffers))

    def _push(self, header: Header) -> Pushed:
        has_norm = bool(header.code & NORM)  # which may be infinite, or NaN
        if not has_norm and not (math.isfinite(header.weight) and header.weight >= 0):
            raise ProtocolError(f"part {header.index} has the weight {header.weight}")
        if not 0 <= header.samples <= header.batch_samples or not header.batch_samples:
            raise ProtocolError(f"part {header.index} has {header.samples} of {header.batch_samples} samples")
        took: Took = None
        buffers: Buffers | None = None
        share = self._session.share
        if share is not None and header.samples:
            took = self._receive(header, share.views, [span.length for span in self._host.spans])
        elif not header.samples:
            self._link.receive_into(header, [])
        else:
            buffers = self._host.take()
            # A gradient counts when all of it is here: what a lost worker leaves behind is nowhere.
            try:
                took = self._receive(header, buffers.views, [span.length for span in buffers.spans], buffers)
            except BaseException:
                self._host.give(buffers)
                raise
        gradient = Gradient(
            index=header.index,
            samples=header.samples,
            batch_samples=header.batch_samples,
            clock=header.clock,
            version=header.version,
            weight=header.weight if header.code & OWN_WEIGHT else None,
            norm=header.weight if has_norm else None,
            took=took,
        )
        if share is not None:
            return self._host.assemblies.push(self._session, gradient, share)
        return self._host.push(self._session, gradient, buffers)

    def _receive(
        self, header: Header, views: Sequence[memoryview], lengths: Sequence[int], buffers: Buffers | None = None
    ) -> Took:
        """A gradient, into these views; which elements of the shard it is of. lengths: of the shard's vectors. buffers: that the views are
        of, where it may be compressed."""
        runs = bytearray(0)
        if header.code & PARTIAL:
            if header.runs > MAX_RUNS:
                raise ProtocolError(f"part {header.index} has {header.runs} runs, more than {MAX_RUNS}")
            runs = bytearray(header.runs * RUN.size)
        if header.code & (BFLOAT16 | SPARSE):
            if buffers is None:
                raise ProtocolError(f"part {header.index} is a share, and compressed")
            if header.nbytes < len(runs):
                raise ProtocolError(f"part {header.index} has {header.nbytes} bytes, fewer than its runs")
            self._link.receive_some_of(memoryview(runs))
            compression.receive(self._link, header, buffers, before=len(runs))
        else:
            self._link.receive_into(header, [memoryview(runs), *views])
        if not header.code & PARTIAL:
            return None
        try:
            return took_of(list(RUN.iter_unpack(runs)), lengths)
        except ValueError as error:
            raise ProtocolError(f"part {header.index}: {error}") from None

    def _patience(self, header: Header) -> float | None:
        if not header.code & PATIENT:
            return None
        if not (math.isfinite(header.weight) and header.weight >= 0):
            raise ProtocolError(f"a PULL has a patience of {header.weight} seconds")
        return header.weight

    def _pull(self, clock: int, step: int, patience: float | None = None) -> None:
        buffers = self._host.pull(
            self._session,
            clock=clock,
            step=None if step < 0 else step,
            patience_seconds=patience,
            waiting=self._waiting,
        )
        if buffers is None:
            self._link.send(Header(op=Op.VALUES, code=NOT_YET))
            return
        if (share := self._session.share) is not None:
            version = buffers.version
            share.gather(buffers.parts)
            self._host.release(buffers)
            self._link.send(Header(op=Op.VALUES, version=version, nbytes=share.nbytes), share.views)
            return
        try:
            nbytes = sum(len(view) for view in buffers.views)
            self._link.send(Header(op=Op.VALUES, version=buffers.version, nbytes=nbytes), buffers.views)
        finally:
            self._host.release(buffers)

    def _still_waiting(self, reason: str) -> None:
        if self._link.hung_up:
            raise Closed("closed by the peer")
        self._link.send_text(Header(op=Op.WAIT), reason)
