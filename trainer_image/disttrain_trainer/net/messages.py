"""The messages between the master and the other processes on the control connection, and their framing.

A message is one line of JSON, {"type": kind, ...}, of at most a mebibyte. Types and fields keep their names between releases. Some are
older
than the names in the code: "generation" is the number of a round, "stay" a lease, "anew" from_scratch, "slices" are parts.
"""

import json
from enum import StrEnum
from typing import Any

MAX_LINE = 1 << 20
"""Bytes of a line. The longest is a server's list of applied parts, whose intervals are few."""

Message = dict[str, Any]


class MessageType(StrEnum):
    """The kinds of messages. Fields in brackets."""

    HELLO = "hello"
    """The first message of a process [job, attempt, role, rank, incarnation, agent,
    token: under TLS that of its role and index, code: the digest of trainer.code or null,
    code_admitted: whether a master of this attempt has admitted it, restarts: those in place of its pod, if any, and what it holds: see
    each role]."""
    WELCOME = "welcome"
    """The master admits it."""
    REFUSED = "refused"
    """The master does not admit it [reason, final]: final when the process was replaced and must end."""
    BEAT = "beat"
    """Heartbeat [waiting_for: from the master, the processes that the job waits for]."""
    LEAVING = "leaving"
    """The process received SIGTERM; it stays until RELEASED."""
    RELEASED = "released"
    """Everything is saved that could be: the process may end."""
    FINISH = "finish"
    """The job is done: end with exit code 0."""
    WRONG = "wrong"
    """To a process: its model or data does not fit the job; it ends [reason]."""
    FAILED = "failed"
    """The process ends because of its own fault [message]. The first one is the root cause; the answer says so [ended: members that had
    done all their work before]."""
    NAN = "nan"
    """The loss, or a parameter, was not finite [step; generation, stay; parts: those that a roll-back leaves out]."""
    REPORT = "report"
    """What was done since the last report [step, steps, samples, loss (sum over the samples, or weighted sum), weight (sum of
    the weights, where these are not the samples), epoch, total_steps;
    final: [part, loss x weight, weight] of each part of the last steps;
    values: by name [value x weight, weight] of the named values; final_values: [part, the same] of each part of the last steps;
    world: from a script or command, the size of the process group that it is in, where it knows; output: it was read from the output of the
    program]."""

    # Rounds with collectives (DataParallel, scripts).
    READY = "ready"
    """The member is in no round and waits for one [step: of the state that it holds, -1 for none; checkpoint: of a sharded model, from
    rank 0, where a round begins that no state is left for; samples, fingerprint and order of its
    data set; layout: a digest of the state's, or, with parameter servers, whether its model has
    buffers, and whether the worker has a place for the trained model (keeps_model); begun: the parts that it may have
    begun, in its order, and their round (generation, stay, servers, slices), as in HELLO]."""
    ROUND = "world"
    """A round begins [generation, source: the rank whose state is the newest; of a sharded model step: that of the state, and holders: the
    ranks that have it, none where it is the checkpoint's; of an elastic job members: the numbers of those that take part, ascending].

    To workers of parameter servers [generation, stay, buffers: the newest checkpoint's file of them, or null, anew: there is no
    checkpoint, primaries: the server of each shard, servers: the incarnations of these]: both ends ignore messages of an earlier lease."""
    REFORM = "reform"
    """A member was lost: leave the round, drop the parts that were not computed, and send READY. To a rank whose training goes back to a
    checkpoint [roll_back, course]; to ranks of a group [stay: the lease that is over]."""
    RESIZE = "resize"
    """To a rank of an elastic job: end the round after the step in work, on all ranks the same, and send READY."""
    COURSE = "course"
    """What a training has decided beside its steps (checkpoint/course.py), after each change [course]. HELLO, READY and ROUND have it, too,
    once there is something to say."""
    NOT_JOINED = "not-joined"
    """To the agents of a script: no process has used the store of this round yet [seconds: since it began]."""
    DONE = "done"
    """The member did all its work [evaluation, model: path and sha256 of its file]."""
    SAVE = "save"
    """To rank 0: save the state now. To a server: save the shards that it serves [id, folder, step].
    To a worker of servers: save the buffers [id, folder]."""
    COPIED = "copied"
    """From a server and a worker of servers: what it is to save is copied, and may change from now on [id: that of the SAVE; of a
    server the shard]."""
    SAVED = "saved"
    """It is saved [step, time, or error; asked: because of SAVE; best: step and value of the best checkpoint];
    from a server and a worker of servers [id: that of the SAVE, file,
    digest, of a server shard and applied, or error]."""

    # Groups of ranks that compute a part together, with parameter servers (docs/design/0018).
    AWAITS_GROUP = "awaits-group"
    """From a rank: it is in no process group, and waits for one."""
    FORM = "form"
    """To a rank: make a process group with the other ranks of its group [formation]."""
    DISSOLVE = "dissolve"
    """To a rank: another one of its group is lost; leave the process group, and send AWAITS_GROUP [formation]."""

    # Parameter servers.
    BEGIN = "begin"
    """To a server: begin this round from this file [generation, file of the checkpoint folder, or null]; it answers with STATE."""
    STATE = "state"
    """To a server: report your state [id]; its answer [id, generation, applied: the parts that count on all shards that it serves,
    ahead: versions by which the newest of these is ahead of the oldest,
    shards: those that it holds, each [shard, term, whether it serves it, whether it has all of it], ...]."""
    NORM = "norm"
    """From a server, with trainer.maxGradientNorm under Sync: the sum of a step is whole on shards that it serves [generation, norms: for
    each shard shard, term, version that the step makes, and scale and nodes of the squared norm of its part, see
    model/square_tree.py; or norm, that with which it made the step. Also in HELLO and STATE].
    To a server: the norm of the whole gradient, with which the step is made [generation, version, norm]."""
    REPLICATE = "replicate"
    """To a server: keep a copy of a shard that it serves on this server [shard, server: its number, or null for none]."""
    COPY = "copy"
    """From the primary of a shard: its copy on that server is complete, or lost [generation, shard, term, server, complete]."""
    PROMOTE = "promote"
    """To a server: serve these shards, of which it has copies [shards: pairs of shard and term]; it answers with STATE."""
    DISCARD = "discard"
    """To a server: these shards, which it served, have another primary now [shards: pairs of shard and term]."""
    DROP = "drop"
    """To a server: these workers are lost [ranks, id]; it answers with STATE."""
    REQUEST = "take"
    """From a worker: assign so many parts [stay, count, done: parts applied since the last message; hedge: the worker is free and asks for
    a hedge, see Waited]."""
    ASSIGN = "tickets"
    """To a worker: compute these [stay, slices]."""
    HEDGE = "hedge"
    """To a free worker that asks: compute this part once more [stay, part, or null: there is none]."""
    MOVED = "moved"
    """To a worker: these parts are another worker's now; leave out those that are not begun [stay, slices]."""
    ABANDON = "abandon"
    """To a worker: another one has done these parts, which it holds or hedges [stay, slices]."""
    EVALUATE = "evaluate"
    """To a worker: all is applied; evaluate the final parameters, and write the model where there is a place for it [step: where the
    training ends before its last one]. Between two steps: evaluate the parameters of a step, or newer ones under Async [stay, step,
    between: true]."""
    EVALUATED = "evaluated"
    """The end: [stay, evaluation, model: path and sha256 of its file]. Between two steps, from a rank: [generation, step, slice, of: how
    many slices there are, evaluation, weights: what each number is the mean of, or null]; from a worker of servers: [stay, begun: it has
    the parameters; missing: it has not those of the step; or step, evaluation, stop: why a hook ends the training]."""


class Waited(StrEnum):
    """How long a worker that asks for a hedge has waited."""

    LITTLE = "little"
    """Less than a part takes: what another worker computes now will soon be done."""
    A_PART = "a-part"
    """As long as a part takes."""


def encode(kind: MessageType, **fields: object) -> bytes:
    """The line of a message. Raises ValueError when it is longer than the other end accepts."""
    line = json.dumps({"type": kind, **fields}, separators=(",", ":")).encode() + b"\n"
    if len(line) > MAX_LINE:
        raise ValueError(f"a {kind} message of {len(line)} bytes; at most {MAX_LINE} are sent")
    return line


def decode(line: bytes) -> Message:
    """The message of a line. Raises ValueError when it is none."""
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("not a message of the control connection: it is nested too deeply") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise ValueError("not a message of the control connection")
    return message


def beat_interval(peer_timeout: float) -> float:
    """Seconds between two beats, so that several fit in the silence after which a peer counts as lost."""
    return min(5.0, peer_timeout / 4)
