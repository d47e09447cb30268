"""trainer.code in this process: checked before anything imports it, then put on the module path, and identified by a digest.

The master compares the digests of an attempt's workers (net/attempt_code.py). Not here: importing factories, running a script.
"""

import hashlib
import sys
from collections.abc import MutableMapping
from dataclasses import replace
from pathlib import Path

from disttrain.api.code import files_of, is_code, module_path, problems, with_code
from disttrain.api.environment import CODE_DIR
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.process import Process

log = logs.get_logger(__name__)


def with_digest(process: Process) -> Process:
    """The process with the digest of its code, if it has code. Raises WrongInput for files that no job may bring."""
    if process.code_dir is None:
        return process
    if not process.code_dir.is_dir():
        raise WrongInput(f"trainer.code: there is no folder {process.code_dir}; {_origin(process)} does not have it")
    files = files_of(process.code_dir)
    for problem in problems(files, only_code=False):
        raise WrongInput(f"trainer.code: {_origin(process)}: {problem}")
    if others := [name for name in sorted(files) if not is_code(name)]:
        log.warning("trainer.code: %s: only .py and .zip can be imported, not %s", _origin(process), ", ".join(others))
    return replace(process, code_digest=_digest(files))


def check_unchanged(process: Process) -> None:
    """Before a program starts that reads the code again: a ConfigMap that is edited changes in the pods that run. Raises WrongInput."""
    if process.code_dir is not None and _digest(files_of(process.code_dir)) != process.code_digest:
        raise WrongInput(
            f"trainer.code: {_origin(process)} was changed after {process.name} had started; the code of an attempt is fixed: "
            "undo the change, or create a new job"
        )


def export(process: Process, environ: MutableMapping[str, str]) -> None:
    """Puts the code before PYTHONPATH, for the Python processes that this one starts."""
    if process.code_dir is not None:
        environ["PYTHONPATH"] = with_code(process.code_dir, environ.get("PYTHONPATH"))


def make_importable(environ: MutableMapping[str, str]) -> None:
    """Puts the code first on the module path of this process."""
    if folder := environ.get(CODE_DIR):
        own = module_path(Path(folder))
        sys.path[:] = [*own, *(entry for entry in sys.path if entry not in own)]


def _origin(process: Process) -> str:
    return process.config.code_origin or str(process.code_dir)


def _digest(files: dict[str, Path]) -> str:
    """SHA-256 over paths and contents of the modules and archives, in the order of their paths."""
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        if is_code(name):
            content = file.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
