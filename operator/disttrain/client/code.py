"""The modules of a folder as the ConfigMap of a job's code, which spec.trainer.code.configMap names.

A ConfigMap has no folders: .py files and .zip archives of the folder itself are its keys; the packages below it go into one more archive.
Not here: what a module may be called (api/code.py).
"""

import base64
import hashlib
import io
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from disttrain.api.code import files_of, is_code, problems
from disttrain.api.names import LABEL_JOB_NAME
from disttrain.kube.api import Body
from disttrain.local import objects

PACKAGES: Final = "packages.zip"
"""The archive of the packages."""
_MOST_READ: Final = 32 << 20
"""Bytes of a folder that are read at all: compressed, more than these would still be too large."""
_FIRST_DAY: Final = (1980, 1, 1, 0, 0, 0)
"""The time of every file of the archive: the same code has the same digest."""


class NotUsable(Exception):
    """The folder's code cannot go into a ConfigMap; a sentence each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def config_map(folder: Path, job: str) -> Body:
    """An immutable ConfigMap of the code in a folder, named after the job and the digest of the code. Raises NotUsable, OSError."""
    files = _read(folder)
    opened: dict[str, Path | io.BytesIO] = {name: io.BytesIO(data) for name, data in files.items()}
    found = list(problems(opened, only_code=True))
    keys = _keys(files)
    body: Body = {"apiVersion": "v1", "kind": "ConfigMap", "immutable": True, **_content(keys)}
    body["metadata"] = {"name": f"{job}-code-{_digest(keys)}", "labels": {LABEL_JOB_NAME: job}}
    size = sum(map(len, keys.values()))
    if size > objects.MOST_BYTES:
        found.append(_too_large(size, files))
    else:
        found += [f"{path[-1]} {text}" if path else text for path, text in objects.problems(body)]
    if PACKAGES in files and PACKAGES in keys and keys[PACKAGES] != files[PACKAGES]:
        found.append(f"{PACKAGES} is the name of the archive that the folders go into: rename it")
    if found:
        raise NotUsable(found)
    return body


def _read(folder: Path) -> dict[str, bytes]:
    """The code of the folder by path. Raises NotUsable where there is none, or far too much."""
    if not folder.is_dir():
        raise NotUsable(["it is no folder; --code takes the one that holds your modules, such as ."])
    paths = {name: path for name, path in files_of(folder).items() if is_code(name) and path.is_file()}
    if not paths:
        raise NotUsable(["it holds no .py file and no .zip archive"])
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    if (size := sum(sizes.values())) > _MOST_READ:
        raise NotUsable([_too_large(size, sizes)])
    return {name: path.read_bytes() for name, path in sorted(paths.items())}


def _keys(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """What the ConfigMap has under each key."""
    keys = {name: data for name, data in files.items() if "/" not in name}
    if packages := {name: data for name, data in files.items() if "/" in name}:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
            for name, data in packages.items():
                out.writestr(zipfile.ZipInfo(name, _FIRST_DAY), data, zipfile.ZIP_DEFLATED)
        keys[PACKAGES] = archive.getvalue()
    return keys


def _content(keys: Mapping[str, bytes]) -> dict[str, Any]:
    """data for what is text, binaryData for the rest."""
    content: dict[str, dict[str, str]] = {"data": {}, "binaryData": {}}
    for name, data in keys.items():
        try:
            content["data"][name] = data.decode()
        except UnicodeDecodeError:
            content["binaryData"][name] = base64.b64encode(data).decode()
    return {name: entries for name, entries in content.items() if entries}


def _digest(keys: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, data in sorted(keys.items()):
        digest.update(f"{len(name)} {name} {len(data)} ".encode() + data)
    return digest.hexdigest()[:12]


def _too_large(size: int, files: Mapping[str, bytes | int]) -> str:
    parts: Counter[str] = Counter()
    for name, data in files.items():
        parts[name.partition("/")[0]] += data if isinstance(data, int) else len(data)
    most = parts.most_common(1)[0][0]
    return (
        f"the code has {size / (1 << 20):.1f} MiB, most of it in {most}, and a ConfigMap holds 1 MiB: move what is no code elsewhere, or "
        "put the code on a claim (trainer.code.persistentVolumeClaim)"
    )
