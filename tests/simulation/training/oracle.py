"""What must hold at every moment, whatever happens. It sees what is said, what is applied and what is written, and keeps its own books."""

from functools import reduce
from operator import and_
from typing import TYPE_CHECKING, Any, Never

from disttrain.api.names import Role
from disttrain_trainer.checkpoint.store import name_of, shard_of
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.net.peers import Member
from simulation.training.volume import ShardFile

if TYPE_CHECKING:
    from simulation.training.job import Job
    from simulation.training.master import Master
    from simulation.training.worker import Worker


class Violation(AssertionError):
    """A promise is broken."""


class Oracle:
    """The promises of a training with parameter servers."""

    def __init__(self, job: "Job") -> None:
        self._job = job
        self._rounds: dict[int, tuple[str, int]] = {}
        """Each worker's present lease and its round, as the master sent them."""
        self._leases: dict[int, int] = {}
        """The worker that has a part, by part, until it reports it as done or its lease ends."""
        self._acknowledged: dict[int, int] = {}
        """By round: the parts that a worker reported, with its present lease, as applied on every server."""
        self._norms: dict[tuple[int, int], float] = {}
        """By round and version: the norm with which a shard has made the step."""
        self._computed: dict[tuple[int, int], Worker] = {}
        """By round and part: the process of a script that had the batch last."""
        self._committed = 0
        """Step of the newest checkpoint."""

    def wrong(self, text: str) -> Never:
        raise Violation(text)

    # The servers.

    def begun(self, round_number: int) -> None:
        """A server begins a round; numbers come again when master and servers are all new."""
        self._acknowledged.pop(round_number, None)
        self._computed = {key: process for key, process in self._computed.items() if key[0] != round_number}
        self._norms = {key: norm for key, norm in self._norms.items() if key[0] != round_number}

    def restored(self, server: int, path: str | None) -> ShardFile | None:
        """The file of which a shard is made again."""
        if path is None:
            return None
        try:
            file = self._job.volume.read(path)
        except KeyError:
            file = None
        return file or self.wrong(f"server {server} is to begin from {path}, which is not there")

    def initialized(self, server: int, parts: int) -> None:
        if parts:
            self.wrong(f"server {server} begins at step 0 from parameters that have learned parts {_names(parts)}")

    def applied(self, server: int, part: int, before: int) -> None:
        if before >> part & 1:
            self.wrong(f"part {part} is applied twice on server {server}")

    def steps_with(self, server: int, round_number: int, version: int, norm: float) -> None:
        """Every shard makes a step with the same norm."""
        if self._norms.setdefault((round_number, version), norm) != norm:
            self.wrong(f"server {server} makes step {version} with another norm than a server before")

    # The workers.

    def computes(self, process: "Worker", round_number: int, part: int, parameters: tuple[int, ...]) -> None:
        """Sync: a gradient is of exactly the parameters of its step, on every shard. A script gets a batch that one had before only if the
        process of that one is lost."""
        worker = process.member
        before = self._computed.get((round_number, part))
        if before is not None and self._job.is_script and self._job.is_present(before):
            self.wrong(f"{worker} gets the batch of part {part} again, which {before.member} has had")
        self._computed[round_number, part] = process
        expected = _all(part - part % self._job.config.parts_per_step)
        if self._job.sync and any(parts != expected for parts in parameters):
            found = [_names(parts) for parts in parameters]
            self.wrong(f"{worker} computes part {part} from parameters with the parts {found}")

    def evaluates(self, worker: Member, parameters: tuple[int, ...]) -> None:
        if any(parts != self._job.every_part for parts in parameters):
            self.wrong(f"{worker} evaluates parameters with the parts {[_names(parts) for parts in parameters]}")

    # The master.

    def master_started(self) -> None:
        self._rounds.clear()
        self._leases.clear()

    def lost(self, member: Member) -> None:
        if member.role is Role.WORKER:
            self._end_lease(member.rank)
            self._forgive(member)

    def received(self, member: Member, message: Message) -> None:
        """Before the coordinator has it."""
        current = self._rounds.get(member.rank)
        if (
            member.role is Role.WORKER
            and message["type"] == MessageType.REQUEST
            and current
            and current[0] == message["stay"]
        ):
            for part in message["done"]:
                self._acknowledged[current[1]] = self._acknowledged.get(current[1], 0) | 1 << part
                self._leases.pop(part, None)

    def sent(self, member: Member, kind: MessageType, fields: dict[str, Any]) -> None:
        match member.role, kind:
            case Role.WORKER, MessageType.ROUND:
                self._end_lease(member.rank)
                round_number = fields["generation"]
                self._rounds[member.rank] = (fields["stay"], round_number)
                if round_number not in self._acknowledged and (known := self._known(round_number)) is not None:
                    self._acknowledged[round_number] = known
            case Role.WORKER, MessageType.REFORM:
                self._end_lease(member.rank)
            case Role.WORKER, MessageType.ASSIGN:
                self._assigns(member, fields["stay"], fields["slices"])
            case Role.PARAMETER_SERVER, MessageType.PROMOTE:
                # What was acknowledged of a step that is not on the copy is computed again.
                self._acknowledged.clear()
                self._computed.clear()
            case Role.PARAMETER_SERVER, MessageType.BEGIN if self._job.has_volume:
                newest = self._job.volume.newest
                name = newest.file_of(shard_of(member.rank)) if newest else None
                path = f"{name_of(newest.step)}/{name}" if newest else None
                if fields["file"] != path:
                    self.wrong(f"{member} is to begin from {fields['file']}; the newest checkpoint has {path}")

    def decided(self, master: "Master") -> None:
        """The coordinator counts no part that some server does not have."""
        queue = master.coordinator.queue
        if queue is None:
            return
        known = self._known(master.tracker.round_number)
        if known is not None and (more := _bits(queue.applied) & ~known):
            self.wrong(f"the master counts parts {_names(more)}, which are not applied on every server")

    def commits(self, *, step: int, parts: int, files: dict[str, str], finished: bool) -> None:
        """A checkpoint is about to be complete."""
        job, folder = self._job, self._job.volume.folders.get(name_of(step))
        written: list[ShardFile] = []
        for server in range(job.config.parameter_servers):
            names = [name for name in files if name.startswith(shard_of(server))]
            file = folder.files.get(names[0]) if folder is not None and len(names) == 1 else None
            if file is None or file.digest != files[names[0]]:
                self.wrong(f"checkpoint {step} is committed without the shard of server {server}: {sorted(files)}")
            if file.parts != _bits(file.applied):
                self.wrong(f"the file of server {server} says {file.applied}, but holds {_names(file.parts)}")
            written.append(file)
        common = reduce(and_, (file.parts for file in written))
        if parts != common.bit_count() or parts < step * job.config.parts_per_step:
            self.wrong(f"checkpoint {step} says {parts} parts; every shard has {_names(common)}")
        expected = _all(step * job.config.parts_per_step) if job.sync else job.every_part if finished else None
        if expected is not None and any(file.parts != expected for file in written):
            held = [_names(file.parts) for file in written]
            self.wrong(f"checkpoint {step} (finished: {finished}) has shards of the parts {held}")
        if finished and step != job.steps:
            self.wrong(f"the last checkpoint is of step {step} of {job.steps}")
        if step < self._committed:
            self.wrong(f"checkpoint {step} is committed after that of step {self._committed}")
        self._committed = step

    def ended(self, master: "Master") -> None:
        """The master says to all that the job is done."""
        job = self._job
        if job.has_volume:
            newest = job.volume.newest
            if newest is None or not newest.finished:
                self.wrong("the job is done without its last checkpoint")
        elif self._known(master.tracker.round_number) not in (None, job.every_part):
            self.wrong("the job is done, but not every part is applied on every server")
        if (master.tracker.evaluation is None) is job.evaluates or (master.tracker.model is None) is job.keeps_model:
            self.wrong("the job is done without the evaluation or the model of its final parameters")
        if missing := job.poisoned - set(master.tracker.course.left_out):
            self.wrong(f"the job is done, and does not say that it left out the parts {sorted(missing)}")
        if master.tracker.step != job.steps:
            self.wrong(f"the job is done at step {master.tracker.step} of {job.steps}")

    def _assigns(self, worker: Member, lease: str, parts: list[int]) -> None:
        present, round_number = self._rounds.get(worker.rank, ("", 0))
        if lease != present:
            self.wrong(f"{worker} gets parts with lease {lease}; its present one is {present}")
        if parts != sorted(set(parts)):
            self.wrong(f"{worker} gets parts out of order: {parts}")
        for part in parts:
            before = self._computed.get((round_number, part))
            if before is not None and not self._job.is_back(before):
                self._forgive(before.member)
            if not self._job.every_part >> part & 1:
                self.wrong(f"{worker} gets part {part}, which the job does not have")
            if self._acknowledged.get(round_number, 0) >> part & 1:
                self.wrong(f"part {part} is assigned again to {worker}, after it was acknowledged")
            if part in self._leases:
                self.wrong(f"part {part} is assigned to {worker}, while worker-{self._leases[part]} has it")
            self._leases[part] = worker.rank

    def _forgive(self, member: Member) -> None:
        """The master takes the worker for lost: others may get its batches."""
        self._computed = {key: process for key, process in self._computed.items() if process.member != member}

    def _end_lease(self, rank: int) -> None:
        self._rounds.pop(rank, None)
        self._leases = {part: worker for part, worker in self._leases.items() if worker != rank}

    def _known(self, round_number: int) -> int | None:
        """The parts that count on every server; None while one of them is not in this round."""
        known = self._job.every_part
        for index in range(self._job.config.parameter_servers):
            host = self._job.primary(index, round_number)
            if host is None:
                return None
            known &= host.accepted
        return known


def _all(count: int) -> int:
    return (1 << count) - 1


def _bits(parts: IndexSet) -> int:
    return sum(_all(stop) ^ _all(start) for start, stop in parts.intervals())


def _names(parts: int) -> str:
    return "{" + ", ".join(str(part) for part in range(parts.bit_length()) if parts >> part & 1) + "}"
