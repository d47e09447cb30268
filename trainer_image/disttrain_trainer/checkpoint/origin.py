"""checkpoint.from: what a job takes over from another job's checkpoint, before it has one of its own.

The folders of a claim's jobs lie beside one another. What is taken is linked into the job's own folder, whole or not at all, so that every
process of the job starts from the same checkpoint, at every restart, whatever the other job writes or removes meanwhile:

    origin-1a2b3c4d/    the other job's checkpoint, by a digest of checkpoint.from; its model is loaded by the workers (include: Model)
    step-00000100/      the same again, as a checkpoint of the job itself (include: All): from then on it is resumed as any other

Any process may do it; the first one decides, for a folder appears by a rename. Not here: how a model takes the tensors (by_name.py).
"""

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from disttrain.api import digests
from disttrain.api.names import uid_in_folder
from disttrain.api.origin import Include, Origin
from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import atomic, resuming, store
from disttrain_trainer.checkpoint.manifest import NAME, Manifest
from disttrain_trainer.checkpoint.store import Checkpoint, Found
from disttrain_trainer.data.schedule import DataSet
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

FOLDER = "origin-"
_BLOCK = 4 << 20


def look(root: Path, config: JobConfig, data: DataSet | None = None) -> Found:
    """Where a job begins: at its own newest checkpoint, or with what it takes over from another job.

    Raises as `store.newest`; and WrongInput, which says what to do, when checkpoint.from names nothing that can be taken over.
    """
    start = taken(root, config)
    found = store.newest(root, config, data)
    return Found(checkpoint=found.checkpoint, skipped=found.skipped, start=start)


def taken(root: Path, config: JobConfig) -> Checkpoint | None:
    """The other job's checkpoint whose model this job starts with at step 0; None where there is no such thing.

    Takes over what checkpoint.from names, if the job has no checkpoint yet. Raises as `look`.
    """
    checkpoint = config.checkpoint
    if checkpoint is None or (asked := checkpoint.from_) is None:
        return None
    folder = root / f"{FOLDER}{hashlib.sha256(asked.model_dump_json(by_alias=True).encode()).hexdigest()[:8]}"
    try:
        own = _newest_own(root)
        if not (folder / NAME).exists():
            if own is not None:
                _refuse_another(own, folder)
                return None
            _take(folder, _Search(root, config, asked, claim=checkpoint.volume.persistent_volume_claim).result())
        manifest = store.manifest_of(folder)
        if asked.include is Include.MODEL:
            return Checkpoint(folder=folder, manifest=manifest)
        if own is None:
            step = manifest.model_copy(update={"job": config.name, "namespace": config.namespace})
            _take(root / store.name_of(manifest.step), Checkpoint(folder=folder, manifest=step))
    except (OSError, ValueError) as error:
        raise store.Unreadable(f"what checkpoint.from names cannot be taken over to {root}: {error}") from None
    return None


def _newest_own(root: Path) -> Manifest | None:
    """The newest manifest in the job's folder that can be read."""
    for folder in store.folders(root):
        with contextlib.suppress(ValueError):
            return store.manifest_of(folder)
    return None


def _refuse_another(own: Manifest, folder: Path) -> None:
    """Raises WrongInput when nothing was trained yet since another checkpoint was taken over: the job would silently go on from that."""
    if own.taken is not None and own.taken != folder.name:
        raise WrongInput(
            f"checkpoint.from: the job has already taken over another checkpoint, of step {own.step}: change the field back, or train it "
            "as a new job (a local run: without --resume)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A checkpoint of the other job."""

    folder: Path
    step: int
    manifest: Manifest | None
    problem: str
    """Why it cannot be taken, as far as its manifest says; "" when it can."""
    later: str
    """The same of one of a later format: no older checkpoint is taken in its place."""
    time: float


class _Search:
    """The search for the checkpoint that is asked for."""

    def __init__(self, root: Path, config: JobConfig, asked: Origin, *, claim: str) -> None:
        self._root = root
        self._config = config
        self._asked = asked
        self._where = f'on claim "{claim}"'

    def result(self) -> Checkpoint:
        """The checkpoint, verified, as this job is to have it. Raises WrongInput, OSError."""
        uid, candidates = self._job()
        job = f"job {self._asked.job} ({uid})"
        if self._asked.step is not None:
            steps = [str(candidate.step) for candidate in candidates]
            candidates = [candidate for candidate in candidates if candidate.step == self._asked.step]
            if not candidates:
                raise self._wrong(
                    f"{job} has no checkpoint of step {self._asked.step} {self._where}; name one of "
                    f"{resuming.listed(steps)}, or leave step out"
                )
        skipped: list[str] = []
        for candidate in candidates:
            if candidate.later:
                raise self._wrong(candidate.later)
            problem, manifest = candidate.problem, candidate.manifest
            if manifest is not None and not problem:
                try:
                    store.verify(candidate.folder, manifest)
                except ValueError as error:
                    problem = str(error)
                else:
                    for why in skipped:
                        log.warning("checkpoint.from: %s is skipped", why)
                    return Checkpoint(folder=candidate.folder, manifest=self._as_ours(manifest, job, skipped))
            skipped.append(f"{candidate.folder.name} ({problem})")
        raise self._wrong(
            f"no checkpoint of {job} {self._where} can be used: {resuming.listed(skipped)}; name another job, "
            + ("another step, " if self._asked.step is not None else "")
            + "or leave checkpoint.from out to start with a new model"
        )

    def _job(self) -> tuple[str, list[_Candidate]]:
        """The uid, and the checkpoints, of the newest job that is meant. Raises WrongInput."""
        asked, strangers = self._asked, set[str]()
        jobs: dict[str, list[_Candidate]] = {}
        there = False
        for folder in sorted(self._root.parent.iterdir()):
            uid = uid_in_folder(folder.name, asked.job)
            if uid is None or folder.name == self._root.name or (asked.uid is not None and asked.uid[:8] != uid):
                continue
            there = True
            candidates = list(self._candidates(folder))
            namespaces = {c.manifest.namespace for c in candidates if c.manifest is not None and c.manifest.namespace}
            if namespaces - {self._config.namespace}:
                strangers |= namespaces
            elif candidates:
                jobs[uid] = candidates
        if jobs:
            uid = max(jobs, key=lambda uid: max(candidate.time for candidate in jobs[uid]))
            return uid, jobs[uid]
        name = f"job {asked.job}" + (f" with uid {asked.uid}" if asked.uid is not None else "")
        if strangers:
            raise self._wrong(
                f"the checkpoints of {name} {self._where} are of namespace {', '.join(sorted(strangers))}; a job starts from one of its "
                f"own namespace, {self._config.namespace}: copy the model there, and load it in trainer.model"
            )
        if there:
            raise self._wrong(
                f"{name} has no complete checkpoint {self._where}; start this job after its first one, or leave checkpoint.from out"
            )
        others = sorted(set(self._others()))
        known = f"jobs that have one there: {resuming.listed(others)}" if others else "no other job has one there"
        raise self._wrong(
            f"there is no checkpoint of {name} {self._where} in namespace {self._config.namespace}; {known}. Name one of the same claim, "
            "or leave checkpoint.from out to start with a new model"
        )

    def _candidates(self, folder: Path) -> Iterator[_Candidate]:
        """The checkpoints in the folder of a job, newest first; a folder without a manifest is none."""
        for step in store.folders(folder):
            manifest, problem, later = None, "", ""
            try:
                time = (step / NAME).stat().st_mtime
                manifest = store.manifest_of(step)
                time = manifest.time.timestamp()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except ValueError as error:
                problem = str(error)
            except WrongInput as error:
                later = str(error)
            if manifest is not None and manifest.job != self._asked.job:
                return
            if manifest is not None and self._asked.include is Include.MODEL and not manifest.tensors:
                problem = "its manifest names no tensors: an older version wrote it"
            yield _Candidate(
                folder=step,
                step=int(step.name.removeprefix(store.PREFIX)),
                manifest=manifest,
                problem=problem,
                later=later,
                time=time,
            )

    def _others(self) -> Iterator[str]:
        """The jobs of the claim that have a checkpoint."""
        for folder in self._root.parent.iterdir():
            if folder.name != self._root.name and folder.is_dir():
                with contextlib.suppress(OSError, WrongInput):
                    if (newest := _newest_own(folder)) is not None:
                        yield newest.job

    def _as_ours(self, manifest: Manifest, job: str, skipped: Iterable[str]) -> Manifest:
        """The manifest for this job's folder. Raises WrongInput when the training of then cannot go on here."""
        everything = self._asked.include is Include.ALL
        if everything:
            free = resuming.CUT if manifest.tensors else ()
            problem = resuming.misfit(manifest.state, resuming.state_of(self._config), free=free)
            problem = problem or resuming.misfit(manifest.data, resuming.data_of(self._config, None))
            if problem:
                raise self._wrong(
                    f"{job} had another setting: {problem}. include: All continues the training of that job, so its settings must be the "
                    "same: write them here, or take its model alone (include: Model)"
                )
        said = (
            f"Goes on at step {manifest.step} of {job}"
            if everything
            else f"Begins with the model of {job}, step {manifest.step}"
        )
        changed = resuming.changes(manifest.record, resuming.record_of(self._config)) if everything else []
        for what, items in (("changed", changed), ("skipped", list(skipped))):
            said += f"; {what}: {resuming.listed(items)}" if items else ""
        return manifest.model_copy(
            update={
                "attempt": self._config.attempt,
                "resumed": said,
                "finished": False,
                "evaluation": None,
                "model": None,
            }
        )

    def _wrong(self, text: str) -> WrongInput:
        return WrongInput(f"checkpoint.from: {text}")


def _take(target: Path, checkpoint: Checkpoint) -> None:
    """Makes `target` a folder with the checkpoint, unless another process was faster. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    manifest = checkpoint.manifest
    manifest = manifest.model_copy(update={"taken": manifest.taken or target.name})
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        for name, digest in manifest.files.items():
            _link(checkpoint.folder / name, temporary / name, digest)
        store.write_manifest(temporary, manifest)
        if target.exists() and not (target / NAME).exists():
            shutil.rmtree(target, ignore_errors=True)  # of a save that was abandoned
        temporary.rename(target)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not (target / NAME).exists():
            raise
    else:
        atomic.sync_folder(target.parent)
        log.info("%s", manifest.resumed)
    for left in target.parent.glob(
        f".{target.name}.*.tmp"
    ):  # of a process that was killed; one that lives finds the folder
        shutil.rmtree(left, ignore_errors=True)


def _link(source: Path, target: Path, digest: str) -> None:
    """Gives a file, which never changes, another name; a copy where the volume has no links. Raises OSError."""
    try:
        os.link(source, target)
        return
    except FileNotFoundError:
        raise
    except OSError:
        pass

    def copy(sink: atomic.Sink) -> None:
        with source.open("rb") as file:
            while block := file.read(_BLOCK):
                sink.write(block)

    if atomic.write(target, copy, digests.algorithm_of(digest)) != digest:
        raise OSError(f"{source} changed while it was copied")
