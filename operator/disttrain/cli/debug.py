"""`disttrain debug`: the stacks of every process of a local run, and one archive of all that helps to find a fault, without its secrets.

Not here: how a process is asked (local/stacks.py), what a secret is (redaction.py).
"""

import contextlib
import io
import json
import platform
import sys
import tarfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

from disttrain import __version__
from disttrain.api.history import FILE
from disttrain.cli import history, machine_checks
from disttrain.cli.redaction import redacted, redacted_text
from disttrain.client.text import one_line
from disttrain.local import stacks
from disttrain.local.runs import NoSuchRun, find_run, is_running

_MOST_BYTES: Final = 2 << 20
"""Of the end of each log."""
_SUFFIX: Final = ".tar.gz"


class CannotDebug(Exception):
    """Why, and what to do."""


def debug(run: str, output: str | None) -> int:
    """Prints the stacks, or writes the archive. 0, or 2 where there is nothing to look at. Raises OSError where it cannot be written."""
    try:
        if output is not None and not output.endswith(_SUFFIX):
            raise CannotDebug(f"-o {one_line(output)}: name an archive that ends with {_SUFFIX}")
        folder = find_run(run)
        uid = _uid(folder)
        runs = is_running(folder)
        if not runs and output is None:
            raise CannotDebug(
                f"run {folder.name} is over and has no stacks; -o {folder.name}{_SUFFIX} takes its logs along"
            )
    except (CannotDebug, NoSuchRun) as error:
        print(f"debug: {error}", file=sys.stderr)
        return 2
    text = "".join(map(_section, stacks.of_run(folder, uid))) if runs else f"run {folder.name} is over\n"
    if output is None:
        print(text, end="")
        return 0
    _archive(Path(output), {"stacks.txt": redacted_text(text), **dict(_files(folder))})
    print(output)
    print(
        "look at it before you hand it on: a secret that has neither the name nor the form of one is still there",
        file=sys.stderr,
    )
    return 0


def _section(one: stacks.Stacks) -> str:
    none = "no stacks: it is not a process of the trainer, or gave no answer\n"
    return f"== {one.name}  pid {one.pid}  {one.state}  {one.command}\n{f'{one.text}{chr(10)}' if one.text else none}\n"


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    """The texts of the archive, by their names."""
    yield "machine.json", json.dumps([one.to_dict() for one in machine_checks.checks()], indent=1)
    yield "versions.txt", _versions()
    for name in ("job.json", "run.json", "scale.json"):
        if (text := _end(folder / name)) is not None:
            yield name, _without_secrets(text)
    with contextlib.suppress(history.NoHistory, OSError):
        yield FILE, redacted_text(history.find(str(folder)).read_text(errors="replace"))
    for part in ("logs", "termination"):
        for path in sorted((folder / part).glob("*")):
            if path.is_file() and (text := _end(path)) is not None:
                yield f"{part}/{path.name}", redacted_text(text)


def _without_secrets(text: str) -> str:
    try:
        return json.dumps(redacted(json.loads(text)), indent=1)
    except (ValueError, RecursionError):
        return redacted_text(text)


def _versions() -> str:
    packages = sorted({f"{one.name} {one.version}" for one in metadata.distributions()}, key=str.lower)
    system = f"disttrain {__version__}\npython {platform.python_version()}\n{platform.platform()}\n"
    return system + "".join(f"{package}\n" for package in packages)


def _end(path: Path) -> str | None:
    """The last part of a file; None where it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _MOST_BYTES))
            return file.read(_MOST_BYTES).decode(errors="replace")
    except OSError:
        return None


def _uid(folder: Path) -> str:
    try:
        return str(json.loads((folder / "run.json").read_bytes())["uid"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CannotDebug(f"{folder / 'run.json'} is damaged: name another run") from None


def _archive(path: Path, texts: dict[str, str]) -> None:
    name = path.name.removesuffix(_SUFFIX)
    with tarfile.open(path, "w:gz") as archive:
        for file, text in texts.items():
            data = text.encode(errors="replace")
            entry = tarfile.TarInfo(f"{name}/{file}")
            entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
            archive.addfile(entry, io.BytesIO(data))
