"""Which checkpoints stay in the folder: the newest, the best, those that a roll-back needs; and which ones a roll-back sets aside.

A checkpoint that is set aside has another name, so that no attempt and no other job takes it: `rolled-back-<step>-of-attempt-<n>`. It stays
until the training has a checkpoint of that step or a later one. Not here: when a job goes back (the operator's plan/health.py).
"""

import contextlib
import itertools
import re
import shutil
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from disttrain.api.course import KeepBest
from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import store
from disttrain_trainer.checkpoint.manifest import NAME, Manifest, OtherFormat
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

_ASIDE = re.compile(r"rolled-back-(\d+)-of-attempt-\d+(-\d+)?")


def prune(
    published: Path,
    manifest: Manifest,
    *,
    keep: int,
    keep_best: KeepBest | None = None,
    roll_back_seconds: int | None = None,
) -> None:
    """After a checkpoint was published: it and the ones before it stay, `keep` in all, beside them the best one, and those that a roll-back
    by so many seconds needs; what older saves left behind goes.

    Those of a later step stay, too: they did not hold, or the training would have gone on from them, so they neither count nor push a
    good one out. So does one whose manifest cannot be read: a user may repair it. What cannot be removed is said: the checkpoint is
    complete all the same.
    """
    kept = 0
    found = store.best(published.parent, keep_best, up_to=manifest.step) if keep_best is not None else None
    spared = {found[0]} if found is not None else set[int]()
    if roll_back_seconds is not None:
        spared |= needed(_times(published.parent, manifest.step), keep=keep, seconds=roll_back_seconds)
    _forget_set_aside(published.parent, manifest.step)
    for folder in store.folders(published.parent):
        if store.step_of(folder.name) > manifest.step:
            continue
        if store.step_of(folder.name) in spared and kept == keep:
            continue
        try:
            if not (folder / NAME).exists() or (kept == keep and _is_readable(folder)):
                # The manifest first: an interrupted removal must not leave a checkpoint that seems whole.
                (folder / NAME).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
            elif _is_readable(folder):
                kept += 1
                _tidy(folder)
        except OSError as error:
            log.warning("%s could not be removed: %s", folder.name, error)


def set_aside(root: Path, roll_back: tuple[int, int] | None, *, config: JobConfig) -> None:
    """Renames the checkpoints that the last roll-back excludes: those of steps after its step, of attempts before its attempt.
    Idempotent, also of several processes at once, and also in later attempts.

    roll_back: attempt and step; None where there was none. The oldest checkpoint whose files hold stays: it is as far back as the training
    can go. But where it is the job's first one, and excluded, the training begins again. Raises store.Unreadable.
    """
    if roll_back is None:
        return
    attempt, step = roll_back
    every = config.checkpoint.every_steps if config.checkpoint is not None else 0
    found: list[tuple[Path, Manifest]] = []
    try:
        for folder in store.folders(root):
            with contextlib.suppress(
                ValueError, WrongInput
            ):  # one that is not whole, or of another format, is not taken anyway
                found.append((folder, store.manifest_of(folder)))
        later = [one for one in found if one[1].step > step and one[1].attempt < attempt and one[1].taken is None]
        oldest = next((one for one in reversed(found) if _holds(*one)), None) if later else None
        if oldest in later and (oldest != found[-1] or oldest[1].step > every):
            log.warning("no checkpoint up to step %d holds: the oldest one is taken, %s", step, oldest[0].name)
            later = later[: later.index(oldest)]
        # Newest first: another process that looks meanwhile finds the same oldest one, or none.
        for folder, manifest in later:
            target = _free(root / f"rolled-back-{manifest.step:08d}-of-attempt-{manifest.attempt}")
            with contextlib.suppress(FileNotFoundError):  # another process was first
                folder.rename(target)
                log.warning("%s is not taken any more, and is now called %s", folder.name, target.name)
    except OSError as error:
        raise store.Unreadable(f"the checkpoints in {root} cannot be renamed: {error}") from None


def needed(checkpoints: Sequence[tuple[int, datetime]], *, keep: int, seconds: int) -> set[int]:
    """The steps of the checkpoints that stay beside the newest `keep`, so that at any time the newest one that is at least `seconds` old is
    at most about twice as old.

    checkpoints: step and time of each, newest first. Invariant: one is removed only where the two beside it are at most `seconds` apart;
    so about three stay.
    """
    if not checkpoints:
        return set()
    span, now = timedelta(seconds=seconds), checkpoints[0][1]
    end, older = checkpoints[min(keep, len(checkpoints)) - 1][1], checkpoints[keep:]
    if now - end >= span or not older:
        return set()
    base = next((index for index, (_, time) in enumerate(older) if now - time >= span), len(older) - 1)
    kept = [older[base]]
    for index in range(base - 1, -1, -1):
        newer = older[index - 1][1] if index else end
        if newer - kept[-1][1] > span:
            kept.append(older[index])
    return {step for step, _ in kept}


def _holds(folder: Path, manifest: Manifest) -> bool:
    """Whether the files are what the manifest says."""
    try:
        store.verify(folder, manifest)
    except ValueError:
        return False
    return True


def _free(path: Path) -> Path:
    """The path, or the first of path-2, path-3 … that does not exist."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain((path,), numbered) if not each.exists())


def _forget_set_aside(root: Path, step: int) -> None:
    """Removes those that were set aside, up to a step that the training has reached again."""
    for folder in root.iterdir():
        if (found := _ASIDE.fullmatch(folder.name)) is not None and int(found[1]) <= step:
            shutil.rmtree(folder, ignore_errors=True)


def _times(root: Path, up_to: int) -> list[tuple[int, datetime]]:
    """Step and time of each checkpoint whose manifest can be read, newest first."""
    found = []
    for folder in store.folders(root):
        with contextlib.suppress(OSError, ValueError, OtherFormat):
            if store.step_of(folder.name) <= up_to:
                found.append((store.step_of(folder.name), Manifest.read((folder / NAME).read_text()).time))
    return found


def _is_readable(folder: Path) -> bool:
    try:
        Manifest.read((folder / NAME).read_text())
    except (ValueError, OtherFormat):
        return False
    return True


def _tidy(folder: Path) -> None:
    """Removes what the manifest does not name: an earlier checkpoint of the same step, and saves that were abandoned."""
    named = Manifest.read((folder / NAME).read_text()).files
    for path in folder.iterdir():
        if path.name != NAME and path.name not in named:
            path.unlink(missing_ok=True)
