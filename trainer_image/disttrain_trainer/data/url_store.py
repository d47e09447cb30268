"""A packed data set at a URL, read by fsspec (data.url): https://filesystem-spec.readthedocs.io.

fsspec brings some protocols itself (file, http with aiohttp); the user's image has the library of any other, such as s3fs or gcsfs.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import fsspec

from disttrain_trainer.data.pack_index import INDEX, file_name
from disttrain_trainer.errors import WrongInput

T = TypeVar("T")

_SECRET: Final = "data.urlSecretName"
_ASKED_AT_ONCE: Final = 16
_REFUSED: Final = frozenset({401, 403})
"""HTTP: who asks has no right to it."""


class UrlStore:
    """A `Store` of a split below a URL. Its methods raise OSError, whatever the library of the protocol raises."""

    kind = "URL"

    def __init__(self, url: str, split: str, options: dict[str, Any]) -> None:
        """options: of fsspec's file system. Raises WrongInput when there is none for the URL."""
        self.split, self._url, self._options = split, _below(url, split), options
        try:
            self._connect()
        except (ImportError, ValueError, TypeError) as error:
            protocol = url.partition("://")[0]
            raise WrongInput(
                f"data.url: {url} cannot be opened: {_first_line(error)}; use an image with fsspec's library for {protocol}, and the "
                f"options that it knows in the Secret of {_SECRET}"
            ) from None

    def where(self, name: str = "") -> str:
        return _below(self._url, name)

    def _connect(self) -> None:
        self._process = os.getpid()
        self._file_system, self._root = fsspec.core.url_to_fs(self._url, **self._options)

    @property
    def _files(self) -> Any:
        """fsspec's file system: in a process that was forked from the one that made it, one of its own, for its thread is not there."""
        if self._process != os.getpid():
            self._connect()
        return self._file_system

    def index(self) -> bytes:
        return self._asked(lambda: bytes(self._files.cat_file(f"{self._root}/{INDEX}")))

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        with contextlib.suppress(OSError):  # not every server lists a folder
            listed = self._asked(lambda: self._files.ls(self._root, detail=True))
            found = {str(entry["name"]).rpartition("/")[2]: entry["size"] for entry in listed if entry.get("size")}
        missing = [name for name in names if name not in found]
        with ThreadPoolExecutor(_ASKED_AT_ONCE) as threads:
            sizes = dict(zip(missing, threads.map(self._size, missing), strict=True))
        return {**found, **{name: size for name, size in sizes.items() if size is not None}}

    def neighbours(self) -> list[str]:
        parent = self._root.rpartition("/")[0]
        there = []
        for split in ("test", "train"):
            with contextlib.suppress(OSError):
                if self._asked(partial(self._files.exists, f"{parent}/{split}/{INDEX}")):
                    there.append(split)
        return there

    def read(self, partition: int, offset: int, length: int) -> bytes:
        name, end = file_name(partition), offset + length
        found = self._asked(lambda: bytes(self._files.cat_file(f"{self._root}/{name}", start=offset, end=end)))
        if len(found) > length:
            raise WrongInput(
                f"{self.where(name)}: {length} bytes were asked for, and {len(found)} came: data.url must be of a server that gives ranges "
                "of a file"
            )
        return found

    def _size(self, name: str) -> int | None:
        try:
            size = self._asked(lambda: self._files.info(f"{self._root}/{name}"))["size"]
        except FileNotFoundError:
            return None
        if size is None:
            raise WrongInput(f"{self.where(name)}: data.url must be of a server that says how long a file is")
        return int(size)

    def _asked(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except OSError:
            raise
        except Exception as error:
            if getattr(error, "status", None) in _REFUSED or "credentials" in type(error).__name__.lower():
                raise PermissionError(errno.EACCES, f"{_first_line(error)}; correct the Secret of {_SECRET}") from None
            raise OSError(errno.EIO, _first_line(error)) from None


def _below(url: str, name: str) -> str:
    """A name below a URL. In a chain, such as simplecache::s3://bucket, it belongs to the first part that has a path."""
    parts = url.split("::")
    at = next((number for number, part in enumerate(parts) if "://" in part), 0)
    parts[at] = f"{parts[at].removesuffix('/')}/{name}"
    return "::".join(parts)


def read_options(path: Path) -> dict[str, Any]:
    """fsspec's options: a folder with a file for each, as a Secret is mounted, or a file with a JSON object. Raises WrongInput."""
    try:
        if path.is_dir():
            texts = {entry.name: entry.read_text() for entry in path.iterdir() if not entry.name.startswith(".")}
        else:
            texts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WrongInput(f"{_SECRET}: {path}: {getattr(error, 'strerror', None) or error}") from None
    return {name: _value(name, text.strip()) for name, text in texts.items()}


def _value(name: str, text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if not text.startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise WrongInput(f"{_SECRET}: the entry {name!r} begins as JSON, and is none: {error}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
