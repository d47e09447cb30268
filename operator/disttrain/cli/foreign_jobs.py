"""PyTorchJob, TFJob, TrainJob and RayJob as a DistTrainJob. Pure.

The result holds only fields that have a value in the other object, so that the defaults of DistTrain apply to the rest. Not here: pods
(foreign_pods.py), what nobody reads (foreign.py).
"""

import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from disttrain.api.names import API_VERSION, KIND, MAX_JOB_NAME, TRAINER_CONTAINER
from disttrain.cli.foreign import Path, Source, whole
from disttrain.cli.foreign_pods import Pods, pods

Spec: TypeAlias = dict[str, Any]

_ENTRY: Final = "write-the-entry-point-of-the-image"
_IMAGE: Final = (
    "must have DistTrain's trainer installed (build it on the trainer image, or pip install 'disttrain[trainer]' in it); its pods are "
    "not root, and write to /tmp or a volume alone"
)
_TENSORFLOW: Final = (
    "is TensorFlow, and DistTrain trains PyTorch: write model and dataset in mine.py (`disttrain init` shows how), and choose optimizer, "
    "epochs and batchSize, which the file does not say"
)
_NO_RAY: Final = (
    "is run once in each worker, under torchrun's environment, and no Ray cluster is there: the loop of a TorchTrainer must become the "
    "program itself"
)
_RUN: Final = "spec", "runPolicy"
_KUEUE: Final = "kueue.x-k8s.io/queue-name"


def convert(source: Source) -> dict[str, Any] | None:
    """The DistTrainJob of an object; None where its kind is none of these."""
    kind = str(source.look("kind"))
    made = KINDS.get((str(source.look("apiVersion")).partition("/")[0], kind))
    if made is None:
        return None
    metadata = _metadata(source)
    spec = made(source)
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec}


def _metadata(source: Source) -> Spec:
    given = source.take("metadata", default={})
    found = {name: given[name] for name in ("name", "namespace", "labels", "annotations") if given.get(name)}
    name = str(found.get("name") or given.get("generateName") or "converted")
    plain = re.sub(r"[^a-z0-9-]+", "-", name.lower()).lstrip("-0123456789")[:MAX_JOB_NAME].rstrip("-") or "converted"
    if not given.get("name"):
        source.note(("metadata",), f"has no name: it becomes {plain}")
    elif plain != name:
        source.note(
            ("metadata", "name"),
            f"{name} becomes {plain}: a job's name has {MAX_JOB_NAME} lower case letters, digits and - at most",
        )
    if _KUEUE in found.get("labels", {}):
        source.note(("metadata", "labels", _KUEUE), "is kept, but this version does not wait for Kueue")
    return {**found, "name": plain}


def _pytorch(source: Source) -> Spec:
    at = ("spec", "pytorchReplicaSpecs")
    master, worker = (source.look(*at, role) for role in ("Master", "Worker"))
    counts = [
        _replicas(source, (*at, role)) for role, there in (("Master", master), ("Worker", worker)) if there is not None
    ]
    role = "Worker" if worker is not None else "Master"
    made = pods(source, (*at, role, "template"))
    if (
        master is not None
        and worker is not None
        and source.look(*at, "Master", "template") != source.look(*at, "Worker", "template")
    ):
        source.note((*at, "Master", "template"), "differs from that of Worker, which all workers get; compare them")
    elif role == "Worker":
        source.take(*at, "Master", "template")
    spec = _command_job(source, made, (*at, role), workers=sum(counts))
    _processes(source, spec, ("spec", "nprocPerNode"))
    _elastic(source, spec)
    _run_policy(source, spec, restarts=[(*at, one, "restartPolicy") for one in ("Master", "Worker")])
    return spec


def _tf(source: Source) -> Spec:
    at = ("spec", "tfReplicaSpecs")
    servers = _replicas(source, (*at, "PS")) if source.look(*at, "PS") is not None else 0
    computing = [role for role in ("Chief", "Master", "Worker") if source.look(*at, role) is not None]
    workers = sum(_replicas(source, (*at, role)) for role in computing)
    worker = next(iter(reversed(computing)), "Worker")
    made = pods(source, (*at, worker, "template"))
    for role in computing:
        if role != worker:
            source.note(
                (*at, role, "template"),
                f"is left out: a {role} is one of the workers, which have the template of {worker}",
            )
    source.drop((*at, "Evaluator"), "is left out: trainer.evaluate and evaluateEverySteps evaluate within the training")
    source.note(
        (*at, worker, "template", "spec"),
        _program(made) + _TENSORFLOW,
    )
    spec: Spec = {
        "strategy": {"type": "ParameterServer", "parameterServer": {"consistency": "Async"}}
        if servers
        else {"type": "DataParallel"},
        "trainer": {
            "model": "mine:model",
            "dataset": "mine:dataset",
            "optimizer": {"name": "Adam", "learningRate": 0.001},
            "epochs": 1,
            "batchSize": 64 * max(1, workers),
        },
        "worker": _role(made, max(1, workers)),
    }
    if servers:
        spec["parameterServer"] = _role(pods(source, (*at, "PS", "template")), servers, gpus=False)
    _run_policy(source, spec, restarts=[(*at, role, "restartPolicy") for role in ("PS", *computing)])
    source.drop(("spec", "successPolicy"), "is left out: a job is complete when its training is")
    source.drop(
        ("spec", "enableDynamicWorker"),
        "is left out: worker.elastic says between which numbers workers may come and go",
    )
    return spec


def _train_job(source: Source) -> Spec:
    at = ("spec", "trainer")
    runtime = source.take("spec", "runtimeRef", "name", default="")
    source.take("spec", "runtimeRef")
    source.note(
        ("spec", "runtimeRef"), f"is not looked up: what the runtime {runtime} sets beyond this object is to be added"
    )
    node: Spec = {
        "name": TRAINER_CONTAINER,
        "image": source.take(*at, "image"),
        "command": source.take(*at, "command"),
        "args": source.take(*at, "args"),
        "env": source.take(*at, "env"),
        "resources": source.take(*at, "resourcesPerNode"),
    }
    pod = _patches(source)
    pod["containers"] = [{name: value for name, value in node.items() if value}]
    made = pods(part := Source({"spec": {"template": {"spec": pod}}}), ("spec", "template"))
    for note in part.notes:
        source.note((*at, *note.path[5:]) if "env" in note.path else at, note.text)
    spec = _command_job(source, made, at, workers=whole(source.take(*at, "numNodes"), 1, least=1))
    _processes(source, spec, (*at, "numProcPerNode"))
    _run_policy(source, spec, restarts=[], at=("spec",))
    source.drop(
        ("spec", "initializer"),
        "is left out: put the data on the claim of data.volume before the job, or into an init container",
    )
    return spec


def _patches(source: Source) -> Spec:
    """What a TrainJob changes in its runtime's pods of the role node."""
    found: Spec = {}
    way = ("trainingRuntimeSpec", "template", "spec", "replicatedJobs")
    for number, _ in enumerate(source.look("spec", "runtimePatches") or ()):
        at: Path = ("spec", "runtimePatches", number)
        source.take(*at, "manager")
        for place, _ in enumerate(source.look(*at, *way) or ()):
            if source.look(*at, *way, place, "name") == "node":
                source.take(*at, *way, place, "name")
                found |= source.take(*at, *way, place, "template", "spec", "template", "spec", default={})
    for number, one in enumerate(source.look("spec", "podTemplateOverrides") or ()):
        if isinstance(one, Mapping) and any(target.get("name") == "node" for target in one.get("targetJobs") or ()):
            source.take("spec", "podTemplateOverrides", number, "targetJobs")
            found |= source.take("spec", "podTemplateOverrides", number, "spec", default={})
    return found


def _ray(source: Source) -> Spec:
    at = ("spec", "rayClusterSpec")
    groups = source.look(*at, "workerGroupSpecs") or []
    if not isinstance(groups, list):
        raise TypeError("workerGroupSpecs is a list")
    path: Path = (*at, "workerGroupSpecs", 0) if groups else (*at, "headGroupSpec")
    made = pods(source, (*path, "template"))
    workers = sum(_replicas(source, (*at, "workerGroupSpecs", number)) for number, _ in enumerate(groups)) or 1
    for number, _ in enumerate(groups):
        group: Path = (*at, "workerGroupSpecs", number)
        for name in ("groupName", "rayStartParams"):
            source.take(*group, name)
        source.drop((*group, "minReplicas"), "is left out: a command has a fixed number of workers")
        source.drop((*group, "maxReplicas"), "is left out: a command has a fixed number of workers")
        if number:
            source.drop((*group, "template"), "is left out: all workers have the template of the first group")
    if groups:
        source.drop(
            (*at, "headGroupSpec"),
            "is left out: the master of a job runs no code of yours",
        )
    source.take(*at, "rayVersion")
    entry = str(source.take("spec", "entrypoint", default=""))
    source.note(
        ("spec", "entrypoint"),
        _NO_RAY,
    )
    try:
        words = tuple(shlex.split(entry))
    except ValueError:
        words = ("sh", "-c", entry)
    source.drop(
        ("spec", "runtimeEnvYAML"), "is left out: install packages in the image, and set variables in worker.template"
    )
    source.take("spec", "shutdownAfterJobFinishes")
    source.take("spec", "submissionMode")
    made = Pods(made.template, made.image, words, made.gpus, bool(words))
    spec = _command_job(source, made, ("spec",), workers=workers)
    _run_policy(source, spec, restarts=[], at=("spec",))
    return spec


def _command_job(source: Source, made: Pods, at: Path, *, workers: int) -> Spec:
    """A program of the user's, once in each worker."""
    command = list(made.command)
    if not made.has_entry:
        source.note(
            at, f"names no command, and the entry point of the image is not known here: write it in place of {_ENTRY}"
        )
        command.insert(0, _ENTRY)
    spec: Spec = {}
    if made.image:
        spec["image"] = made.image
        source.note(at, f"image {made.image} {_IMAGE}")
    return {
        **spec,
        "strategy": {"type": "DataParallel"},
        "trainer": {"command": command},
        "worker": _role(made, max(1, workers)),
    }


def _role(made: Pods, replicas: int, *, gpus: bool = True) -> Spec:
    role: Spec = {"replicas": replicas}
    role |= {"gpusPerWorker": made.gpus} if made.gpus and gpus else {}
    return role | ({"template": made.template} if made.template else {})


def _replicas(source: Source, path: Path) -> int:
    return whole(source.take(*path, "replicas"), 1)


def _program(made: Pods) -> str:
    return f"{' '.join(made.command) or 'the program of the image'}{f' in {made.image}' if made.image else ''} "


def _processes(source: Source, spec: Spec, path: Path) -> None:
    """Processes of each worker, as PET_NPROC_PER_NODE."""
    given = source.take(*path)
    if (count := whole(given, 0, least=1)) > 0:
        spec["worker"]["processesPerWorker"] = count
    elif given == "cpu":
        source.note(path, "cpu: write worker.processesPerWorker; the default is one for each GPU, or one")


def _elastic(source: Source, spec: Spec) -> None:
    at = ("spec", "elasticPolicy")
    for name in ("rdzvBackend", "rdzvPort", "rdzvHost", "rdzvId", "rdzvConf", "standalone"):
        source.take(*at, name)
    _processes(source, spec, (*at, "nProcPerNode"))
    if (restarts := source.take(*at, "maxRestarts")) is not None:
        spec.setdefault("runPolicy", {})["backoffLimit"] = min(1000, whole(restarts, 6))
    text = (
        "is left out: a command has a fixed number of workers; a script or a loop of DistTrain may have worker.elastic"
    )
    source.drop((*at, "minReplicas"), text)
    source.drop((*at, "maxReplicas"), text)


def _run_policy(source: Source, spec: Spec, *, restarts: list[Path], at: Path = _RUN) -> None:
    """Deadlines, retries, clean-up, suspension, gang, restarts."""
    policy: Spec = spec.get("runPolicy", {})
    for name, least in (("activeDeadlineSeconds", 1), ("ttlSecondsAfterFinished", 0), ("backoffLimit", 0)):
        if (value := source.take(*at, name)) is not None:
            policy[name] = whole(value, 0, least=least)
    if (clean := source.take(*at, "cleanPodPolicy")) is not None:
        policy["cleanPodPolicy"] = clean
    if policy:
        spec["runPolicy"] = policy
    if source.take(*at, "suspend") is True:
        spec["suspend"] = True
        source.note((*at, "suspend"), "is kept: the job waits until `disttrain resume`")
    gang = (*at, "schedulingPolicy")
    if (priority := source.take(*gang, "priorityClass")) is not None:
        spec.setdefault("scheduling", {})["priorityClassName"] = priority
    if (seconds := source.take(*gang, "scheduleTimeoutSeconds")) is not None:
        spec.setdefault("scheduling", {})["timeoutSeconds"] = whole(seconds, 600, least=1)
    source.drop((*gang, "minAvailable"), "is left out: a gang is the whole job")
    source.drop((*gang, "minResources"), "is left out: a gang is the whole job")
    policies = {source.take(*path) for path in restarts} - {None}
    if policies == {"Never"}:
        spec["failurePolicy"] = {"defaultAction": "FailJob"}
    elif "ExitCode" in policies:
        path = next(path for path in restarts if source.look(*path) == "ExitCode")
        source.note(
            path,
            "ExitCode: 1, 2, 126 and 127 fail the job, after any other code the pod is replaced; see failurePolicy.rules",
        )


KINDS: Final[Mapping[tuple[str, str], Callable[[Source], Spec]]] = {
    ("kubeflow.org", "PyTorchJob"): _pytorch,
    ("kubeflow.org", "TFJob"): _tf,
    ("trainer.kubeflow.org", "TrainJob"): _train_job,
    ("ray.io", "RayJob"): _ray,
}
"""By group and kind; the version of the group does not matter."""
