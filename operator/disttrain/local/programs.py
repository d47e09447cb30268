"""What each process of a local run is: its command line and its environment, as the manifests give them to a pod.

The differences to a pod are all here: ports of loopback for names of a Service, folders for volumes, a share of this machine's cores and
GPUs for the resources of a container. Not here: starting anything (processes.py).
"""

import importlib.machinery
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from disttrain.api import environment as names
from disttrain.api.job import DistTrainJob
from disttrain.api.names import TRAINER_CONTAINER, Role
from disttrain.api.runtime import Addresses
from disttrain.api.spec import Script
from disttrain.api.template import PodTemplate
from disttrain.local.addresses import Ports
from disttrain.local.documents import Documents, FieldPath, Unusable
from disttrain.local.folders import RunFolder
from disttrain.local.guard import MARK
from disttrain.local.processes import Process
from disttrain.manifests.environment import processes_per_worker, training_environment
from disttrain.manifests.pod import GRACE_SECONDS, GRACE_SECONDS_WITH_CHECKPOINT

TRAINER: Final = "disttrain_trainer"
_ROLE_FIELDS: Final = {Role.MASTER: "master", Role.PARAMETER_SERVER: "parameterServer", Role.WORKER: "worker"}
_CARRIED_OUT: Final = {
    "containers",
    "restartPolicy",
    "terminationGracePeriodSeconds",
    "nodeSelector",
    "tolerations",
    "affinity",
}
"""Fields of a pod that a local run obeys, or that have no meaning on one machine."""


class Programs:
    """The processes of one job on this machine. Raises Unusable when one of them cannot be."""

    def __init__(self, job: DistTrainJob, documents: Documents, folder: RunFolder, ports: Ports) -> None:
        self._job = job
        self._documents = documents
        self._folder = folder
        self._ports = ports
        self._gpus = _gpus()
        self._script = self._prepare_script()
        self._check()

    def arguments(self, role: Role) -> list[str]:
        """The command line of a role."""
        command = self._job.spec.trainer.command
        if role is Role.WORKER and command is not None:
            return list(command)
        return [sys.executable, "-m", TRAINER]

    def environment(self, process: Process) -> dict[str, str]:
        """The whole environment of a process."""
        job, role = self._job, process.role
        # We may ourselves be run by a training, whose ranks and addresses are none of this one's.
        foreign = {name for name in os.environ if name in names.RESERVED or name.startswith(names.PREFIX)}
        inherited = {name: value for name, value in os.environ.items() if name not in foreign}
        cores = max(1, len(os.sched_getaffinity(0)) // (job.spec.worker.replicas * processes_per_worker(job)))
        ours = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores)),
            "CUDA_VISIBLE_DEVICES": ",".join(self._gpus_of(role, process.index)),
        }
        told = training_environment(
            self._told(),
            role,
            process.index,
            process.attempt,
            self._addresses(),
            metrics_port=process.metrics_port,
            termination_log=str(process.termination_log.absolute()),
            checkpoint_dir=self._checkpoint_dir(),
            data_dir=self._data_dir(),
        )
        local = {names.PARENT_PID: str(os.getpid()), MARK: self._folder.uid}
        templates = self._documents.environment(job, self._template(role), self._path(role))
        return inherited | ours | templates | told | local

    def grace_seconds(self, role: Role) -> float:
        """How long a process of the role has after SIGTERM."""
        default = GRACE_SECONDS_WITH_CHECKPOINT if self._job.spec.checkpoint else GRACE_SECONDS
        return float(_pod_spec(self._template(role)).get("terminationGracePeriodSeconds", default))

    def warnings(self) -> Iterator[tuple[FieldPath, str]]:
        """What the job asks for and a local run leaves out."""
        for role in Role:
            path = (*self._path(role), "template", "spec")
            for position, container in enumerate(_pod_spec(self._template(role)).get("containers", ())):
                if container["name"] != TRAINER_CONTAINER:
                    yield (*path, "containers", position), "is a sidecar; a local run starts the training alone"
                elif "volumeMounts" in container:
                    yield (
                        (*path, "containers", position, "volumeMounts"),
                        "is not mounted: a local run has no containers",
                    )
            for name in sorted(_pod_spec(self._template(role)).keys() - _CARRIED_OUT):
                yield (*path, name), "has no effect in a local run"

    def _addresses(self) -> Addresses:
        servers = self._job.spec.parameter_server
        # A command has no agent of ours that could announce the master's store: its first worker hosts it itself.
        host = Role.WORKER if self._job.spec.trainer.command is not None else Role.MASTER
        return Addresses(
            control=self._ports.address(Role.MASTER, 0, "control"),
            rendezvous=self._ports.address(host, 0, "rendezvous"),
            parameter_servers=tuple(
                self._ports.address(Role.PARAMETER_SERVER, index, "data")
                for index in range(servers.replicas if servers else 0)
            ),
        )

    def _told(self) -> DistTrainJob:
        """The job with its script where it lies on this machine."""
        if self._script is None:
            return self._job
        trainer = self._job.spec.trainer.model_copy(update={"script": self._script})
        return self._job.model_copy(update={"spec": self._job.spec.model_copy(update={"trainer": trainer})})

    def _prepare_script(self) -> Script | None:
        script = self._job.spec.trainer.script
        if script is None:
            return None
        path = ("spec", "trainer", "script")
        if script.config_map is None:
            if not Path(script.file).is_file():
                raise Unusable(
                    (*path, "file"),
                    f'no file "{script.file}" in {Path.cwd()}; run from its folder, or name a configMap',
                )
            return script
        folder = self._folder.config(script.config_map)
        self._documents.value("ConfigMap", script.config_map, script.file, (*path, "configMap"))
        self._documents.write("ConfigMap", script.config_map, folder, (*path, "configMap"))
        return script.model_copy(update={"config_map": None, "file": str(folder / script.file)})

    def _checkpoint_dir(self) -> str | None:
        checkpoint = self._job.spec.checkpoint
        return (
            str(self._folder.checkpoints(checkpoint.volume.persistent_volume_claim).absolute()) if checkpoint else None
        )

    def _data_dir(self) -> str | None:
        volume = self._job.spec.data.volume if self._job.spec.data else None
        return str(self._folder.claim(volume.persistent_volume_claim).absolute()) if volume else None

    def _template(self, role: Role) -> PodTemplate | None:
        spec = self._job.spec
        holder = {Role.MASTER: spec.master, Role.PARAMETER_SERVER: spec.parameter_server, Role.WORKER: spec.worker}[
            role
        ]
        return holder.template if holder else None

    def _path(self, role: Role) -> FieldPath:
        return ("spec", _ROLE_FIELDS[role])

    def _gpus_of(self, role: Role, index: int) -> list[str]:
        # "" hides every GPU, as a container that asked for none sees none.
        each = self._job.spec.worker.gpus_per_worker if role is Role.WORKER else 0
        return self._gpus[index * each : (index + 1) * each]

    def _check(self) -> None:
        job = self._job
        wanted = job.spec.worker.replicas * job.spec.worker.gpus_per_worker
        if wanted > len(self._gpus):
            raise Unusable(
                ("spec", "worker", "gpusPerWorker"),
                f"the job needs {wanted} GPUs, this machine has {len(self._gpus)}; 0 runs it on the CPU",
            )
        if not (_importable(TRAINER) and _importable("torch")):
            raise Unusable((), "a local run needs the trainer and torch: pip install 'disttrain[trainer]'")
        for field in ("model", "dataset", "loss", "evaluate"):
            factory: str | None = getattr(job.spec.trainer, field)
            if factory is not None and not _importable(package := factory.partition(":")[0].partition(".")[0]):
                raise Unusable(
                    ("spec", "trainer", field),
                    f'no module "{package}" in {Path.cwd()} or among the installed packages; run from its folder, or install it',
                )
        for role in Role:
            self._documents.environment(job, self._template(role), self._path(role))


def _importable(package: str) -> bool:
    """Whether a process in the current folder would find a top-level module. Imports nothing."""
    return (
        package in sys.builtin_module_names
        or importlib.machinery.PathFinder.find_spec(package, [str(Path.cwd()), *sys.path]) is not None
    )


def _pod_spec(template: PodTemplate | None) -> dict[str, Any]:
    return template.pod_spec() if template else {}


def _gpus() -> list[str]:
    """The GPUs that we may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    numbers = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*"))
    return sorted((number for number in numbers if number.isdigit()), key=int)
