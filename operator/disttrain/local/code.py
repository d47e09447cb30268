"""trainer.code of a local run: the ConfigMap of the file, the claim's folder, or the current folder, in that order.

Not here: what a file of the code may be called (api/code.py).
"""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

from disttrain.api.code import files_of, problems
from disttrain.api.trainer import Trainer
from disttrain.local.documents import Documents
from disttrain.local.folders import RunFolder
from disttrain.local.objects import ConfigMap
from disttrain.local.references import FieldPath, Unusable

_CODE: FieldPath = ("spec", "trainer", "code")


def in_config_map(trainer: Trainer, content: ConfigMap) -> Iterator[tuple[FieldPath, str]]:
    """What is wrong with the code that a job has in a ConfigMap of its file."""
    assert trainer.code is not None
    files = content.files()
    opened = {key: io.BytesIO(data) for key, data in files.items()}
    for problem in problems(opened, only_code=True):
        yield (*_CODE, "configMap"), f"{trainer.code.origin}: {problem}"
    if trainer.script is not None and trainer.script.file not in files:
        known = ", ".join(sorted(files)) or "none"
        message = f'{trainer.code.origin} has no key "{trainer.script.file}"; it has {known}'
        yield ("spec", "trainer", "script", "file"), message


def folder_of(trainer: Trainer, documents: Documents, folder: RunFolder) -> Path | None:
    """The folder with the code of a job; None for a job without code, and where the current folder stands for it.

    Relative to the current folder. Raises Unusable.
    """
    code = trainer.code
    if code is None:
        return None
    if code.config_map is not None:
        content = documents.config_map(code.config_map)
        if content is None:
            return None
        for path, message in in_config_map(trainer, content):
            raise Unusable(path, message)
        place = folder.config(code.config_map)
        shutil.rmtree(place, ignore_errors=True)  # a resumed run has the keys of before
        documents.write("ConfigMap", code.config_map, place, (*_CODE, "configMap"))
        return place
    assert code.persistent_volume_claim is not None
    place = folder.claim(code.persistent_volume_claim).joinpath(code.path or "")
    if not files_of(place):
        return None
    for problem in problems(files_of(place), only_code=False):
        raise Unusable((*_CODE, "persistentVolumeClaim"), f"{code.origin}: {problem}")
    return place
