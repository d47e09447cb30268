"""`disttrain data pack`, the part that imports torch and runs the user's factory: `python -m disttrain_trainer.pack`."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from disttrain.api.environment import ExitCode
from disttrain_trainer.data import pack_writer
from disttrain_trainer.data.sealing import read_key
from disttrain_trainer.errors import TrainerError, WrongInput
from disttrain_trainer.model.factories import add_current_folder, resolve
from disttrain_trainer.model.task import factory_seeds
from disttrain_trainer.runtime import termination

_SPLITS = ("train", "test")
_TICK_SECONDS = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    """Packs. Exit codes: 0 done, 1 the user's code or the disk failed, 2 wrong input, 130 interrupted."""
    options = make_parser().parse_args(arguments)
    try:
        pack(options)
        return 0
    except TrainerError as error:
        _say(f"data pack: {error}")
        return int(error.exit_code)
    except OSError as error:
        _say(f"data pack: {error.filename or options.out}: {error.strerror or error}; nothing was written")
        return 1
    except KeyboardInterrupt:
        _say("data pack: interrupted; nothing was written")
        return 130
    except Exception as error:
        reported = termination.of_user_error(error)[1]
        _say(f"data pack: {options.dataset}: {reported.message}" + (f" ({reported.where})" if reported.where else ""))
        return int(ExitCode.USER_ERROR)


def make_parser() -> argparse.ArgumentParser:
    """The arguments, as `disttrain data pack` hands them on."""
    parser = argparse.ArgumentParser(prog="disttrain data pack")
    parser.add_argument("dataset")
    parser.add_argument("out")
    parser.add_argument("--partitions", type=int, required=True)
    parser.add_argument("--key")
    parser.add_argument("--config", default="{}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", action="append")
    return parser


def pack(options: argparse.Namespace) -> None:
    """Packs each split into a folder of its own. Raises WrongInput, OSError, and what the user's code raises."""
    out, splits = Path(options.out), tuple(options.split or _SPLITS)
    if not 1 <= options.partitions <= 1_000_000:
        raise WrongInput(f"--partitions {options.partitions}: expected 1 to 1000000")
    for split in splits:
        if split not in _SPLITS:
            raise WrongInput(f"--split {split}: expected train or test")
        if (out / split).exists():
            raise WrongInput(f"{out / split} is there already: remove it, or name another folder; nothing was written")
    config = _config(options.config)
    key = read_key(Path(options.key), "--key") if options.key is not None else None
    add_current_folder()
    factory = resolve("dataset", options.dataset, "config", "split")
    for split in splits:
        with factory_seeds(options.seed):
            dataset = factory(dict(config), split)
        what = f"{options.dataset} ({split})"
        samples = _length(dataset, what)
        began, screen = time.monotonic(), _Screen(split, samples)
        index = pack_writer.write(
            dataset, out / split, split=split, partitions=options.partitions, key=key, what=what, on_sample=screen.show
        )
        screen.clear()
        size = sum(part.size for part in index.partitions)
        blocks = sum(len(part.blocks) for part in index.partitions)
        print(
            f"{out / split}: {samples} samples in {options.partitions} partitions, {blocks} blocks, {_bytes(size)}, "
            f"{index.encryption or 'not encrypted'}, {time.monotonic() - began:.1f} s"
        )
        print(f"  a sample: {index.structure}")
    print(f"  to train on it: put the content of {out} on the claim of data.volume, or where data.url is, and set")
    print("  trainer.dataset: disttrain_trainer.data:packed")
    if key is not None:
        print("  data.encryption.secretName: a Secret that has the key under `key`")


def _length(dataset: Any, what: str) -> int:
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise WrongInput(
            f"{what} is a {type(dataset).__name__}; expected a map-style dataset, with __len__ and __getitem__"
        )
    if (length := len(dataset)) < 1:
        raise WrongInput(f"{what} is empty; expected at least one sample, or name the other split alone: --split")
    return length


def _config(text: str) -> dict[str, Any]:
    """A JSON object, or that of a file."""
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise WrongInput(
                f"--config {text}: {getattr(error, 'strerror', None) or error}; expected a JSON object, or its file"
            ) from None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise WrongInput(f"--config: {error}; expected a JSON object, or its file") from None
    if not isinstance(found, dict):
        raise WrongInput(f"--config is a {type(found).__name__}; expected a JSON object, or its file")
    return found


class _Screen:
    """A line that shows how far it is, on a terminal."""

    def __init__(self, split: str, samples: int) -> None:
        self._split, self._samples = split, samples
        self._next = time.monotonic() + _TICK_SECONDS if sys.stderr.isatty() else float("inf")

    def show(self, done: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _TICK_SECONDS
            sys.stderr.write(
                f"\r{self._split}: {done} of {self._samples} samples, {100 * done // self._samples} %\033[K"
            )
            sys.stderr.flush()

    def clear(self) -> None:
        if self._next != float("inf"):
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


def _bytes(size: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024  # type: ignore[assignment]
    return f"{size:.1f} TiB"


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.stdout.flush()
    code = main()
    sys.stdout.flush()
    os._exit(code)  # as our roles leave: the user's threads and libraries are not waited for
