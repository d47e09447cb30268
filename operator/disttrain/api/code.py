"""spec.trainer.code: modules of the user that no image holds. Which files count, and which names a module must not have.

One set of rules for `lint`, `run` and the trainer. Not here: where the files are mounted (manifests/pod.py), their digest (the trainer).
"""

import os
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Annotated, Any, Final

from pydantic import StringConstraints

from disttrain.api.base import Model, Rule
from disttrain.api.types import DnsSubdomain

MODULE: Final = ".py"
ARCHIVE: Final = ".zip"
_IMPORTED: Final = (MODULE, ".pyc", ".so")
"""How a file ends that `import` finds, such as random.pyc or torch.cpython-311-x86_64-linux-gnu.so."""
ESCAPES: Final = "^/|(^|/)[.][.]?(/|$)|//|/$"
"""A path that does not stay below a folder, or that says it in a way of its own."""
_OURS: Final = frozenset({"disttrain", "disttrain_trainer"})
_REQUIRED: Final = frozenset(
    {
        *("torch", "numpy", "safetensors", "prometheus_client", "pydantic", "pydantic_core", "annotated_types", "re2"),
        *("typing_extensions", "typing_inspection"),
        *("filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy"),
    }
)
"""What the trainer requires, and what torch does. The code stands before them on the module path."""


class Code(Model):
    """Python modules for factories, script and command: .py files and .zip archives, each on PYTHONPATH."""

    RULES = (
        Rule(
            cel="has(self.configMap) != has(self.persistentVolumeClaim)",
            check=lambda code: (code.config_map is None) != (code.persistent_volume_claim is None),
            message="set exactly one of configMap and persistentVolumeClaim",
        ),
        Rule(
            cel="!has(self.path) || !has(self.configMap)",
            check=lambda code: code.path is None or code.config_map is None,
            message="belongs to persistentVolumeClaim; a ConfigMap has no folders",
            field="path",
            shows="path",
        ),
        Rule(
            cel=f"!has(self.path) || !self.path.matches('{ESCAPES}')",
            check=lambda code: code.path is None or not escapes(code.path),
            message="must be a folder on the claim, such as team/src: a relative path without '..'",
            field="path",
            shows="path",
        ),
    )
    config_map: DnsSubdomain | None = None
    """ConfigMap whose keys are .py files and .zip archives, 1 MiB in all."""
    persistent_volume_claim: DnsSubdomain | None = None
    """Claim that holds the files; every worker mounts it read-only."""
    path: Annotated[str, StringConstraints(pattern=r"^[-._/a-zA-Z0-9]+$", max_length=253)] | None = None
    """Folder on the claim, a relative path of letters, digits, '-', '_', '.' and '/'. Default: the whole claim."""

    @property
    def origin(self) -> str:
        """Where the code comes from, for messages."""
        if self.config_map is not None:
            return f'ConfigMap "{self.config_map}"'
        folder = f' (folder "{self.path}")' if self.path else ""
        return f'claim "{self.persistent_volume_claim}"{folder}'


def escapes(path: str) -> bool:
    """Whether a path is no plain relative one, or could leave its folder."""
    return re.search(ESCAPES, path) is not None


def of_older_release(trainer: Any) -> Any:
    """The stored `spec.trainer` of a release that had script.configMap: the ConfigMap is its code. Any other value as it is."""
    script = trainer.get("script") if isinstance(trainer, dict) else None
    if not isinstance(script, dict) or script.get("configMap") is None:
        return trainer
    rest = {name: value for name, value in script.items() if name != "configMap"}
    return {"code": {"configMap": script["configMap"]}, **trainer, "script": rest}


def files_of(folder: Path) -> dict[str, Path]:
    """The files of a code folder by their paths in it: modules and archives below it, and whatever lies in the folder itself.

    Hidden files and folders are left out, as those in which Kubernetes keeps the versions of a ConfigMap.
    """
    found: dict[str, Path] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for name in names:
            file = Path(place, name)
            top = file.parent == folder
            if not name.startswith(".") and (name.endswith((MODULE, ARCHIVE)) or top):
                found[file.relative_to(folder).as_posix()] = file
    return found


def module_path(folder: Path) -> list[str]:
    """What a folder of code adds to PYTHONPATH: itself, and each archive in it."""
    return [str(folder), *(str(folder / name) for name in sorted(files_of(folder)) if is_archive(name))]


def with_code(folder: Path, before: str | None) -> str:
    """PYTHONPATH with the code of a folder in front of the entries that it had; an empty one stands for the current folder."""
    own = module_path(folder)
    entries = before.split(os.pathsep) if before else []
    return os.pathsep.join([*own, *(entry for entry in entries if entry not in own)])


def is_archive(name: str) -> bool:
    """Whether a file of the code is an archive on PYTHONPATH."""
    return name.endswith(ARCHIVE) and "/" not in name


def is_code(name: str) -> bool:
    """Whether a file of the code can be imported: a module, or an archive on PYTHONPATH."""
    return name.endswith(MODULE) or is_archive(name)


def problems(files: Mapping[str, Path | IO[bytes]], *, only_code: bool) -> Iterator[str]:
    """What is wrong with the files of the code, one sentence each.

    files: by path from the code's folder on; the content is read of archives alone. only_code: whether any other file is refused.
    """
    for name, content in sorted(files.items()):
        if is_archive(name):
            yield from _of_archive(name, content)
        elif only_code and not is_code(name):
            yield f"{name} is neither a {MODULE} file nor a {ARCHIVE} archive: remove it, or keep it on a volume"
        elif owner := _owner(name):
            yield f"{name} has the name of a module of {owner}, which it would replace: rename it"


def _of_archive(name: str, content: Path | IO[bytes]) -> Iterator[str]:
    try:
        with zipfile.ZipFile(content) as archive:
            members = sorted(archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        yield f"{name} cannot be read as a zip archive: {error}"
        return
    for member in members:
        if owner := _owner(member):
            yield f"{member} in {name} has the name of a module of {owner}, which it would replace: rename it"


def _owner(file: str) -> str | None:
    """Whose module a file hides, None when it hides none. file: its path from an entry of PYTHONPATH on."""
    head, _, rest = file.partition("/")
    name = rest or head
    stem = name.partition(".")[0]
    if not name.endswith(_IMPORTED) or (rest and stem != "__init__"):
        return None
    module = head if rest else stem
    if module in _OURS:
        return "DistTrain"
    if module in _REQUIRED:
        return "a package that the trainer needs"
    return "Python" if module in sys.stdlib_module_names else None
