"""The texts that a name stands for, as `kubectl -f` has it: a file, a folder, a URL, or `-` for standard input.

Not here: what is in the texts (yaml_lines.py).
"""

import codecs
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

SUFFIXES: Final = (".json", ".yaml", ".yml")
"""Files of a folder that kubectl reads; it does not look into folders within."""
_BOMS: Final = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_DOWNLOAD_SECONDS: Final = 30
_MOST_BYTES: Final = 64 << 20
"""Of one file or download: no file of objects is larger."""


class Unreadable(Exception):
    """A text cannot be had. `name` is the file, the message says why and what to do, and `line` is 0 where none is to blame."""

    def __init__(self, name: str, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.name = name
        self.message = message
        self.line = line


def files(name: str) -> list[str]:
    """The names of the single files that a name stands for. Raises Unreadable."""
    if name == "-" or _is_url(name) or not Path(name).is_dir():
        return [name]
    try:
        found = sorted(str(path) for path in Path(name).iterdir() if path.suffix in SUFFIXES and path.is_file())
    except OSError as error:
        raise Unreadable(name, f"cannot be read: {error.strerror}; check the path") from None
    if not found:
        raise Unreadable(name, f"the folder holds no file that ends with {', '.join(SUFFIXES)}")
    return found


def text(name: str) -> str:
    """The text of one file. Raises Unreadable."""
    data = _bytes(name)
    if len(data) > _MOST_BYTES:
        raise Unreadable(name, f"is larger than {_MOST_BYTES >> 20} MiB; a file of objects is not")
    encoding = next((encoding for mark, encoding in _BOMS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Unreadable(name, f"is not {encoding.upper()} text: {error.reason}; save it as UTF-8", line) from None


def _bytes(name: str) -> bytes:
    try:
        if name == "-":
            return sys.stdin.buffer.read(_MOST_BYTES + 1)
        if _is_url(name):
            with urllib.request.urlopen(name, timeout=_DOWNLOAD_SECONDS) as answer:  # http and https alone
                return bytes(answer.read(_MOST_BYTES + 1))
        with Path(name).open("rb") as file:
            return file.read(_MOST_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise Unreadable(name, f"cannot be read: the server answers {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise Unreadable(name, f"cannot be read: {getattr(error.reason, 'strerror', None) or error.reason}") from None
    except OSError as error:
        hint = "" if name == "-" else "; check the path"
        raise Unreadable(name, f"cannot be read: {error.strerror or error}{hint}") from None
    except ValueError as error:  # a path with a NUL, a URL without a host
        raise Unreadable(name, f"cannot be read: {error}") from None


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))
