"""`disttrain export`: the model of a checkpoint as one safetensors file, with the names of state_dict().

Without torch: the bytes of the tensors are copied.
"""

import contextlib
import glob
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import StringConstraints, TypeAdapter, ValidationError

from disttrain.api import digests
from disttrain.api.digested import verified
from disttrain.api.names import MODEL_FILE
from disttrain.api.tensor_index import EXTRA_JSON, PART, Entry, Header, Piece, read_header
from disttrain.local.runs import ROOT

MANIFEST = "manifest.json"
FORMAT = 3
"""The newest format of a manifest that is understood."""
_BLOCK = 4 << 20
_STEPS = "step-*"
_FILES = TypeAdapter(dict[Annotated[str, StringConstraints(pattern=r"^[^/\x00]+$")], str])
_INDEX = TypeAdapter(dict[str, Entry])
_CODES: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
"""Types of a memoryview by bytes: elements are moved and never read as numbers."""


class CannotExport(Exception):
    """There is no model to be had; the text says why, and what to do."""


def export(source: str, output: str) -> int:
    """Writes the model of a checkpoint, a checkpoint folder, or a run's newest checkpoint; 0, or 2 for what cannot be used, or 1."""
    try:
        folder, tensors, size = _exported(source, output)
    except CannotExport as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"export: {error.filename or output}: {error.strerror or error}; no model was written", file=sys.stderr)
        return 1
    print(f"{output}: {tensors} tensors, {size} bytes, from {folder}")
    print(f'from safetensors.torch import load_file\nmodel.load_state_dict(load_file("{output}"))')
    return 0


def _exported(source: str, output: str) -> tuple[Path, int, int]:
    """The checkpoint that was written out, the number of its tensors, and the bytes of the file. Raises CannotExport, OSError.

    A run that goes on may remove its newest checkpoint while it is read: then it is the one that took its place.
    """
    while True:
        folder = _checkpoint(source)
        path = _output(output, folder)
        try:
            index = _index(folder)
            return folder, len(index), _write(path, folder, index)
        except (CannotExport, FileNotFoundError):
            if folder == Path(source) or (folder / MANIFEST).exists():
                raise


def _checkpoint(source: str) -> Path:
    """The folder of the checkpoint that is meant. Raises CannotExport."""
    path = Path(source)
    if (path / MANIFEST).exists() or path.name.startswith("step-"):
        return path
    run = path.name
    if not path.is_dir():  # a job's name stands for its newest run
        runs = sorted((ROOT / "runs").glob(f"{glob.escape(run)}-*/run.json"), key=lambda run: run.stat().st_mtime)
        run = ([run, *(file.parent.name for file in runs if file.parent.name.rsplit("-", 3)[0] == run)])[-1]
    folders = [path, *(ROOT / "claims").glob(f"*/{glob.escape(run)}")]
    for folder in folders:
        steps = [step for step in folder.glob(_STEPS) if step.name.removeprefix("step-").isdecimal()]
        complete = [step for step in steps if (step / MANIFEST).exists()]
        if complete:
            return max(complete, key=lambda step: int(step.name.removeprefix("step-")))
    trained = ROOT / "runs" / run / MODEL_FILE
    if trained.exists():
        raise CannotExport(
            f"run {run} has no checkpoint, and needs none: its training is done and left its model in {trained}"
        )
    raise CannotExport(
        f"there is no complete checkpoint in {source}: name a checkpoint (step-…), a folder of checkpoints, "
        f"a run in {ROOT / 'runs'}, or its job"
    )


def _output(name: str, folder: Path) -> Path:
    """The file to write: of a link, the one that it leads to. Raises CannotExport for what is there and must stay."""
    path = Path(os.path.realpath(name))
    if not name or (path.exists() and not path.is_file()):
        raise CannotExport(f"-o {name or repr(name)} is no regular file: name one, such as model.safetensors")
    if folder.resolve() in path.parents:
        raise CannotExport(f"-o {name} is in the checkpoint itself, which must stay as it is: name a file elsewhere")
    return path


def _index(folder: Path) -> dict[str, Entry]:
    """What the manifest says of the model, with every file compared with its digest. Raises CannotExport, OSError."""
    older = "; name an older checkpoint of the same folder, if there is one"
    try:
        manifest = verified((folder / MANIFEST).read_text())
        number, files = manifest["format"], _FILES.validate_python(manifest["files"])
    except FileNotFoundError:
        raise CannotExport(f"{folder} has no {MANIFEST}: the checkpoint was not completed{older}") from None
    except ValidationError:
        raise CannotExport(f"{folder / MANIFEST} is damaged: it does not list its files{older}") from None
    except KeyError as error:
        raise CannotExport(f"{folder / MANIFEST} is damaged: it has no {error.args[0]}{older}") from None
    except ValueError as error:
        raise CannotExport(f"{folder / MANIFEST} is damaged: {error}{older}") from None
    if not isinstance(number, int) or number > FORMAT:
        raise CannotExport(
            f"{folder} has format {number}, and this version reads formats up to {FORMAT}: use a later one"
        )
    if not manifest.get("tensors"):
        raise CannotExport(
            f"{folder} does not name its tensors: an older version wrote it; "
            "go on with the job for a step and export its next checkpoint"
        )
    for name, expected in files.items():
        try:
            actual = digests.of(folder / name, like=expected)
        except FileNotFoundError:
            raise CannotExport(f"{folder} is torn: {name} is missing{older}") from None
        except ValueError as error:
            raise CannotExport(f"{folder / MANIFEST} is damaged: {name}: {error}{older}") from None
        if actual != expected:
            raise CannotExport(f"{folder} is torn: {name} does not have the digest that the manifest says{older}")
    try:
        found = _INDEX.validate_python(manifest["tensors"])
    except ValidationError as error:
        raise CannotExport(f"{folder / MANIFEST} is damaged: {error.errors()[0]['msg']}{older}") from None
    if strangers := {piece.file for entry in found.values() for piece in entry.pieces} - files.keys():
        raise CannotExport(f"{folder / MANIFEST} is damaged: it does not list {min(strangers)}{older}")
    return {name: entry for name, entry in found.items() if not name.endswith(EXTRA_JSON) and PART not in name}


def _write(path: Path, folder: Path, index: dict[str, Entry]) -> int:
    """Writes the file atomically; its size in bytes. Raises CannotExport, OSError."""
    try:
        headers = {file: read_header(folder / file) for file in {p.file for e in index.values() for p in e.pieces}}
    except ValueError as error:
        raise CannotExport(f"{folder} is damaged: {error}") from None
    names = sorted(index, key=lambda name: (-_itemsize(index[name].dtype), name))
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        entry = index[name]
        _check(name, entry, headers)
        start, end = end, end + prod(entry.shape) * _itemsize(entry.dtype)
        described[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with contextlib.ExitStack() as stack, temporary.open("xb") as output:
            sources = {name: stack.enter_context((folder / name).open("rb")) for name in headers}
            output.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for block in _blocks(index[name], headers, sources):
                    output.write(block)
            output.flush()
            os.fsync(output.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path) if error.filename == str(temporary) else error.filename
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return 8 + len(text) + end


def _check(name: str, entry: Entry, headers: dict[str, Header]) -> None:
    """Raises CannotExport unless the pieces make up the tensor, and the files hold what the manifest says."""
    at = 0
    for piece in _runs(entry):
        stored = headers[piece.file].tensors.get(piece.key)
        fits = stored is not None and stored["dtype"] == entry.dtype
        if not fits or piece.start != at or piece.offset + piece.length > headers[piece.file].length(piece.key):
            raise CannotExport(
                f"{piece.file} is of another model than the manifest: it does not hold {name} as it says"
            )
        at += piece.length
    if at != prod(entry.shape):
        raise CannotExport(f"the manifest is damaged: it has {at} of the {prod(entry.shape)} elements of {name}")


def _blocks(entry: Entry, headers: dict[str, Header], sources: Mapping[str, BinaryIO]) -> Iterator[bytes]:
    """The bytes of a tensor in the order of a contiguous one."""
    if entry.strides is not None:
        memory = b"".join(_blocks(entry.model_copy(update={"strides": None}), headers, sources))
        yield _contiguous(memory, entry, entry.strides)
        return
    size = _itemsize(entry.dtype)
    for piece in _runs(entry):
        source, header = sources[piece.file], headers[piece.file]
        source.seek(header.data + header.tensors[piece.key]["data_offsets"][0] + piece.offset * size)
        left = piece.length * size
        while left:
            block = source.read(min(left, _BLOCK))
            if not block:
                raise CannotExport(f"{piece.file} is torn: it ends before {piece.key} does")
            left -= len(block)
            yield block


def _runs(entry: Entry) -> list[Piece]:
    """Every run of the tensor's pieces, in the order of its elements."""
    return sorted((run for piece in entry.pieces for run in piece.runs()), key=lambda run: run.start)


def _contiguous(memory: bytes, entry: Entry, strides: Sequence[int]) -> bytes:
    """Elements that lie by strides, such as channels last, in the order of a contiguous tensor."""
    code = _CODES[_itemsize(entry.dtype)]
    source, result = memoryview(memory).cast(code), memoryview(bytearray(len(memory))).cast(code)
    inner, step = entry.shape[-1], strides[-1]
    for row, outer in enumerate(product(*map(range, entry.shape[:-1]))):
        begin = sum(number * stride for number, stride in zip(outer, strides, strict=False))
        result[row * inner : (row + 1) * inner] = source[begin : begin + (inner - 1) * step + 1 : step]
    return bytes(result.cast("B"))


def _itemsize(dtype: str) -> int:
    """Bytes of an element of a type of safetensors, such as 4 for F32."""
    digits = "".join(c for c in dtype.partition("_")[0] if c.isdecimal())
    return int(digits) // 8 if digits else 1
