"""The copy's end of the connection from the primary of a shard: the snapshot, and then record after record."""

from disttrain_trainer.model.flat import bytes_of
from disttrain_trainer.net.frames import (
    MAX_BUFFERS,
    MAX_RUNS,
    MAX_SNAPSHOT_TEXT,
    NORM,
    PARTIAL,
    RUN,
    SCALES,
    Header,
    Link,
    Op,
    ProtocolError,
)
from disttrain_trainer.parameter_server.following import Follow
from disttrain_trainer.parameter_server.participation import took_of
from disttrain_trainer.parameter_server.replicated_host import ReplicatedHost
from disttrain_trainer.parameter_server.shard_file import ShardFile
from disttrain_trainer.parameter_server.update_log import Record

MAX_PARTS = 1 << 24
"""Of one record."""


def receive_follow(link: Link, header: Header) -> Follow:
    """The body of FOLLOW. Raises what the connection raises, and ProtocolError."""
    return Follow.decode(link.receive_bytes(header, most=MAX_SNAPSHOT_TEXT))


def receive_snapshot(link: Link, follow: Follow) -> tuple[ShardFile, dict[int, bytes | bytearray]]:
    """The snapshot, and the buffers of steps."""
    tensors = follow.empty()
    link.receive_into(_expect(link, Op.INIT), [bytes_of(tensor) for tensor in tensors.values() if tensor.numel()])
    kept: dict[int, bytes | bytearray] = {}
    for _ in range(follow.kept):
        header = _expect(link, Op.KEEP)
        kept[header.step] = link.receive_bytes(header, most=MAX_BUFFERS)
    return follow.file(tensors), kept


def follow_on(link: Link, host: ReplicatedHost, *, timeout_seconds: float) -> None:
    """Blocks, and does what the primary does, until the connection ends. timeout_seconds: for a change of the keys.

    Raises Closed, Silent, ProtocolError; Refusal once it is promoted.
    """

    def acknowledge() -> None:
        link.send(Header(op=Op.DONE))

    acknowledge()
    while True:
        header = link.receive(patient=True)
        match header.op:
            case Op.UPDATE:
                record = _update(link, header, host)
            case Op.KEEP:
                record = Record(kept=(header.step, link.receive_bytes(header, most=MAX_BUFFERS)))
            case Op.RENEW:
                acknowledge()
                link.renew(within=timeout_seconds)
                continue
            case Op.COMPLETE:
                record = Record(complete=True)
            case _:
                raise ProtocolError(f"{header.op.name} is not for a copy")
        host.follow(record, acknowledge)


def _update(link: Link, header: Header, host: ReplicatedHost) -> Record:
    parts = (header.index, header.index + header.samples)
    if not 0 < header.samples <= MAX_PARTS:
        raise ProtocolError(f"an UPDATE of {header.samples} parts")
    if not header.nbytes:
        return Record(parts=parts)
    norm = header.weight if header.code & NORM else None
    if header.runs > MAX_RUNS:
        raise ProtocolError(f"an UPDATE has {header.runs} runs, more than {MAX_RUNS}")
    summed = host.take_sum()
    head = bytearray(SCALES.size + header.runs * RUN.size)
    link.receive_into(header, [memoryview(head), *summed.views])
    scale, rate = SCALES.unpack_from(head)
    took = None
    if header.code & PARTIAL:
        try:
            took = took_of(list(RUN.iter_unpack(head[SCALES.size :])), [span.length for span in summed.spans])
        except ValueError as error:
            raise ProtocolError(f"an UPDATE of part {header.index}: {error}") from None
    return Record(parts=parts, gradient=summed, scale=scale, rate=rate, norm=norm, took=took)


def _expect(link: Link, op: Op) -> Header:
    header = link.receive()
    if header.op is not op:
        raise ProtocolError(f"{header.op.name} where {op.name} is expected")
    return header
