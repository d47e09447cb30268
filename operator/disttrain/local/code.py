"""trainer.code of a local run: the ConfigMap of the file, the claim's folder, or the current folder, in that order.

Not here: what a file of the code may be called (api/code.py).
"""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

from disttrain.api.code import Code, files_of, problems
from disttrain.api.trainer import Script, Trainer
from disttrain.local.documents import Documents
from disttrain.local.folders import RunFolder
from disttrain.local.objects import ConfigMap
from disttrain.local.references import FieldPath, Unusable

_CODE: FieldPath = ("spec", "trainer", "code")


def in_config_map(code: Code, script: Script | None, content: ConfigMap) -> Iterator[tuple[FieldPath, str]]:
    """What is wrong with the code that a job has in a ConfigMap of its file."""
    files = content.files()
    opened = {key: io.BytesIO(data) for key, data in files.items()}
    for problem in problems(opened, only_code=True):
        yield (*_CODE, "configMap"), f"{code.origin}: {problem}"
    if script is not None and script.file not in files:
        known = ", ".join(sorted(files)) or "none"
        message = f'{code.origin} has no key "{script.file}"; it has {known}'
        yield ("spec", "trainer", "script", "file"), message


def folder_of(trainer: Trainer, documents: Documents, folder: RunFolder) -> Path | None:
    """The folder with the code of a job; None for a job without code, and where the current folder stands for it.

    Relative to the current folder. Raises Unusable.
    """
    match trainer.code:
        case Code(config_map=str(name)) as code if (content := documents.config_map(name)) is not None:
            for path, message in in_config_map(code, trainer.script, content):
                raise Unusable(path, message)
            place = folder.config(name)
            shutil.rmtree(place, ignore_errors=True)  # a resumed run has the keys of before
            documents.write("ConfigMap", name, place, (*_CODE, "configMap"))
            return place
        case Code(persistent_volume_claim=str(claim)) as code:
            place = folder.claim(claim).joinpath(code.path or "")
            for problem in problems(files_of(place), only_code=False):
                raise Unusable((*_CODE, "persistentVolumeClaim"), f"{code.origin}: {problem}")
            return place if files_of(place) else None
    return None
