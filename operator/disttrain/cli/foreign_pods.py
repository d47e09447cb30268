"""The pod template of another operator as that of a role of a DistTrainJob. Pure."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from disttrain.api.environment import PREFIX, RESERVED
from disttrain.api.names import GPU, TRAINER_CONTAINER
from disttrain.cli.foreign import Path, Source, whole

_TRAINERS: Final = ("pytorch", "tensorflow", "node", "trainer", "ray-worker", "ray-head")
"""What the others call the container that trains."""
_OWN_FIELDS: Final = ("command", "args", "image", "ports", "restartPolicy", "lifecycle", "name")
_OF_POD: Final = {
    "restartPolicy": "",
    "automountServiceAccountToken": "no pod of a job gets a token of the API server",
    "enableServiceLinks": "",
    "hostname": "DistTrain names the pods",
    "subdomain": "DistTrain names the pods",
}
"""Fields of a pod that DistTrain sets itself, and what is said of one; "" where nothing changes for the user."""


@dataclass(frozen=True, slots=True)
class Pods:
    """The pods of a role."""

    template: dict[str, Any]
    """{} where nothing of it is left."""
    image: str | None = None
    command: tuple[str, ...] = ()
    """The entry point, with its arguments; empty where the image's own is meant."""
    gpus: int = 0
    has_entry: bool = False
    """Whether the file names the program, and not only its arguments."""


def pods(source: Source, path: Path) -> Pods:
    """The template at a path, which is taken."""
    template = copy.deepcopy(source.take(*path, default={}))
    spec = template.get("spec") if isinstance(template, Mapping) else None
    if not isinstance(spec, dict):
        return Pods({})
    for name, said in _OF_POD.items():
        if spec.pop(name, None) is not None and said:
            source.note((*path, "spec", name), f"is left out: {said}")
    containers = [one for one in spec.get("containers") or () if isinstance(one, dict)]
    number = next((i for i, one in enumerate(containers) if one.get("name") in _TRAINERS), 0)
    trainer = containers[number] if containers else {}
    gpus = _gpus(trainer)
    found = Pods(
        template={},
        image=trainer.get("image"),
        command=tuple(map(str, [*(trainer.get("command") or ()), *(trainer.get("args") or ())])),
        gpus=gpus,
        has_entry=bool(trainer.get("command")),
    )
    if trainer:
        kept = {name: value for name, value in trainer.items() if name not in _OWN_FIELDS}
        _environment(kept, source, (*path, "spec", "containers", number))
        _security(kept, source, (*path, "spec", "containers", number))
        kept = {name: value for name, value in kept.items() if value not in ({}, [], None)}
        spec["containers"] = [
            *([{"name": TRAINER_CONTAINER, **kept}] if kept else []),
            *(one for i, one in enumerate(containers) if i != number),
        ]
        if trainer.get("lifecycle"):
            source.note((*path, "spec", "containers", number, "lifecycle"), "is left out: the trainer ends by SIGTERM")
    metadata = template.get("metadata") or {}
    kept_metadata = {name: metadata[name] for name in ("labels", "annotations") if metadata.get(name)}
    spec = {name: value for name, value in spec.items() if value not in ({}, [], None)}
    left = {name: value for name, value in (("metadata", kept_metadata), ("spec", spec)) if value}
    return Pods(left, found.image, found.command, gpus, found.has_entry)


def _gpus(container: dict[str, Any]) -> int:
    """GPUs of a container, which are taken out of its resources: worker.gpusPerWorker has them."""
    resources = container.get("resources")
    if not isinstance(resources, dict):
        return 0
    found = 0
    for part in ("limits", "requests"):
        amounts = resources.get(part)
        if isinstance(amounts, dict):
            found = max(found, whole(amounts.pop(GPU, 0), 0))
            if not amounts:
                del resources[part]
    return found


def _environment(container: dict[str, Any], source: Source, path: Path) -> None:
    kept = []
    for number, variable in enumerate(container.get("env") or ()):
        name = variable.get("name") if isinstance(variable, Mapping) else None
        if isinstance(name, str) and (name in RESERVED or name.startswith(PREFIX)):
            source.note((*path, "env", number), f"{name} is left out: DistTrain sets it")
        else:
            kept.append(variable)
    if "env" in container:
        container["env"] = kept


def _security(container: dict[str, Any], source: Source, path: Path) -> None:
    context = container.get("securityContext")
    if isinstance(context, dict) and context.get("readOnlyRootFilesystem") is False:
        del context["readOnlyRootFilesystem"]
        text = "is left out: the trainer's root file system is read-only; write to /tmp, or mount a volume"
        source.note((*path, "securityContext", "readOnlyRootFilesystem"), text)
