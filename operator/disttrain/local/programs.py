"""What each process of a local run is: its command line and its environment, as the manifests give them to a pod.

The differences to a pod are all here: ports of loopback for names of a Service, folders for volumes, a share of this machine's cores and
GPUs for the resources of a container. Not here: starting anything (processes.py).
"""

import json
import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from disttrain import certificates
from disttrain.api import environment as names
from disttrain.api import trainer_status
from disttrain.api.code import module_path, with_code
from disttrain.api.job import DistTrainJob
from disttrain.api.joining import JOIN_KEY, join_file, join_token
from disttrain.api.names import CERTIFICATE, LABEL_INDEX, LABEL_JOB_NAME, LABEL_ROLE, TRAINER_CONTAINER, Role, pod_name
from disttrain.api.policies import Tls
from disttrain.api.runtime import Addresses
from disttrain.api.storage import KEY_OF_SECRET
from disttrain.api.trainer import Command
from disttrain.local import code, machine
from disttrain.local.addresses import LOCAL_NODE, LOOPBACK, Ports
from disttrain.local.documents import Documents
from disttrain.local.expansion import expanded
from disttrain.local.folders import RunFolder
from disttrain.local.guard import MARK
from disttrain.local.processes import Process
from disttrain.local.references import FieldPath, Unusable
from disttrain.manifests.environment import (
    default_environment,
    keeping_workers,
    reports_status,
    store_host,
    training_environment,
)
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
    "schedulerName",
}
"""Fields of a pod that a local run obeys, or that have no meaning on one machine."""
_CARRIED_OUT_IN_CONTAINER: Final = {"name", "env", "envFrom", "resources"}
"""The same of the trainer's container."""


class Programs:
    """The processes of one job on this machine. Raises Unusable when one of them cannot be, OSError when a volume's folder cannot."""

    def __init__(self, job: DistTrainJob, documents: Documents, folder: RunFolder, ports: Ports) -> None:
        self._job = job
        self._documents = documents
        self._folder = folder
        self._ports = ports
        self._runs_command = isinstance(job.spec.trainer.work, Command)
        self._reads_output = self._runs_command and job.spec.trainer.progress is not None
        self._gpus = machine.gpus()
        self._code = code.folder_of(job.spec.trainer, documents, folder)
        self._data_key = self._key_in_memory()
        self._data_url_options = self._url_options_in_memory()
        self._status_tokens: dict[int, str] = {}
        self._check()
        self._checkpoint_dir()  # makes the folders, or says now that they cannot be made
        self._data_dir()

    def resize(self, job: DistTrainJob) -> None:
        """The job has another number of workers now: what starts from now on gets it."""
        self._job = job

    def arguments(self, process: Process) -> list[str]:
        """The command line of a process."""
        work = self._job.spec.trainer.work
        if process.role is not Role.WORKER or not isinstance(work, Command):
            return [sys.executable, "-P", "-m", TRAINER]
        # On a cluster the command is the container's own, in which the kubelet expands the names of the container's variables.
        variables = self._container_environment(process)
        words = [expanded(word, variables) for word in work.words]
        if not self._reads_output:
            return words
        # Not in the reader's own environment: a file there may have the name of a module of Python's.
        here = () if (path := self._python_path(variables)) is None else ("env", f"PYTHONPATH={path}")
        return [sys.executable, "-P", "-m", TRAINER, *here, *words]

    def environment(self, process: Process) -> dict[str, str]:
        """The whole environment of a process."""
        job, role = self._job, process.role
        # The shell may itself be a part of a training, or of a Slurm job, whose ranks and addresses do not hold for this job.
        inherited = {name: value for name, value in os.environ.items() if not names.is_of_another_training(name)}
        cores = max(1, len(os.sched_getaffinity(0)) // (job.spec.worker.most * job.spec.worker.processes))
        ours = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores)),
            "CUDA_VISIBLE_DEVICES": ",".join(self._gpus_of(role, process.index)),
        }
        local = {names.PARENT_PID: str(os.getpid()), MARK: self._folder.uid}
        variables = inherited | ours | self._container_environment(process) | local
        if role is Role.WORKER and not self._reads_output and (path := self._python_path(variables)) is not None:
            variables["PYTHONPATH"] = path
        return variables

    def _python_path(self, variables: Mapping[str, str]) -> str | None:
        """PYTHONPATH of a command that has trainer.code; None for another program: the trainer puts the code on its module path itself."""
        if not self._runs_command or self._job.spec.trainer.code is None:
            return None
        before = variables.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
        return with_code((self._code or Path.cwd()).absolute(), before)

    def grace_seconds(self, role: Role) -> float:
        """How long a process of the role has after SIGTERM."""
        default = GRACE_SECONDS_WITH_CHECKPOINT if self._job.spec.checkpoint else GRACE_SECONDS
        return float(self._job.spec.template_of(role).pod_spec().get("terminationGracePeriodSeconds", default))

    def warnings(self) -> Iterator[tuple[FieldPath, str]]:
        """What the job asks for and a local run leaves out."""
        spec = self._job.spec
        if spec.image is not None:
            yield ("spec", "image"), "is not used: a local run has the Python and the programs of this machine"
        if spec.data is not None and spec.data.volume is not None and "path" in spec.data.volume.model_fields_set:
            yield (
                ("spec", "data", "volume", "path"),
                f"is not there: the data lies in {self._data_dir()}, as ${names.DATA_DIR} says",
            )
        if spec.trainer.code is not None and self._code is None:
            said = f"{spec.trainer.code.origin} is not here: the code is that of the current folder, {Path.cwd()}"
            yield ("spec", "trainer", "code"), said
        for role in Role:
            path = (*self._path(role), "template", "spec")
            for position, container in enumerate(self._job.spec.template_of(role).pod_spec().get("containers", ())):
                where = (*path, "containers", position)
                if container["name"] != TRAINER_CONTAINER:
                    yield where, "is a sidecar; a local run starts the training alone"
                    continue
                for name in sorted(container.keys() - _CARRIED_OUT_IN_CONTAINER):
                    mounts = name == "volumeMounts"
                    yield (
                        (*where, name),
                        "is not mounted: a local run has no containers" if mounts else "has no effect in a local run",
                    )
            for name in sorted(self._job.spec.template_of(role).pod_spec().keys() - _CARRIED_OUT):
                yield (*path, name), "has no effect in a local run"

    def _addresses(self) -> Addresses:
        return Addresses(
            control=self._ports.address(Role.MASTER, 0, "control"),
            rendezvous=self._ports.address(store_host(self._job), 0, "rendezvous"),
            parameter_servers=tuple(
                self._ports.address(Role.PARAMETER_SERVER, index, "data") for index in range(self._job.spec.servers)
            ),
            copies=tuple(
                self._ports.address(Role.WORKER, index, "data") for index in range(keeping_workers(self._job))
            ),
        )

    def _job_of_processes(self) -> DistTrainJob:
        """The job as its processes know it: where the current folder stands for the code, it has none."""
        if self._code is not None or self._job.spec.trainer.code is None:
            return self._job
        trainer = self._job.spec.trainer.model_copy(update={"code": None})
        return self._job.model_copy(update={"spec": self._job.spec.model_copy(update={"trainer": trainer})})

    def _checkpoint_dir(self) -> str | None:
        checkpoint = self._job.spec.checkpoint
        return (
            str(self._folder.checkpoints(checkpoint.volume.persistent_volume_claim).absolute()) if checkpoint else None
        )

    def _data_dir(self) -> str | None:
        volume = self._job.spec.data.volume if self._job.spec.data else None
        return str(self._folder.claim(volume.persistent_volume_claim).absolute()) if volume else None

    def _tls_dir(self, attempt: int) -> str | None:
        """The folder of the attempt's certificate, which its first process causes to be made."""
        if self._job.spec.network.tls is Tls.DISABLED:
            return None
        folder = self._folder.tls(attempt)
        if not folder.is_dir():
            self._folder.keep_secret(
                folder,
                certificates.of_attempt(self._job.metadata, attempt, now=datetime.now(UTC))
                | certificates.join_secrets(()),
            )
        return str(folder.absolute())

    def _tls_dir_of(self, process: Process) -> str | None:
        """The same, with the join token of a process in it."""
        folder = self._tls_dir(process.attempt)
        if folder is not None and process.role is not Role.MASTER:
            token = join_token((Path(folder) / JOIN_KEY).read_bytes(), process.role, process.index)
            self._folder.add_secret(Path(folder), join_file(process.role, process.index), token.encode())
        return folder

    def public_key(self, attempt: int) -> str | None:
        """That of the certificate of an attempt; None where network.tls is Disabled, "" of an attempt whose certificate is gone."""
        if self._job.spec.network.tls is Tls.DISABLED:
            return None
        try:
            return certificates.public_key((self._folder.tls(attempt) / CERTIFICATE).read_bytes())
        except OSError:
            return ""

    def _key_in_memory(self) -> str | None:
        """A file with the key of data.encryption."""
        encryption = self._job.spec.data.encryption if self._job.spec.data else None
        if encryption is None:
            return None
        path = ("spec", "data", "encryption", "secretName")
        key = self._documents.entry("Secret", encryption.secret_name, KEY_OF_SECRET, path)
        return self._in_memory("data-key", key)

    def _url_options_in_memory(self) -> str | None:
        """A file with the entries of the Secret of data.urlSecretName, as a JSON object."""
        name = self._job.spec.data.url_secret_name if self._job.spec.data else None
        if name is None:
            return None
        path = ("spec", "data", "urlSecretName")
        entries = self._documents.entries("Secret", name, path)
        return self._in_memory(
            "data-url", json.dumps({key: text.decode(errors="replace") for key, text in entries.items()}).encode()
        )

    def _status_token(self, attempt: int) -> str:
        """A file with the token for reports of an attempt."""
        if attempt not in self._status_tokens:
            token = trainer_status.token(self._job.metadata.uid, attempt)
            self._status_tokens[attempt] = self._in_memory("status-token", token.encode())
        return self._status_tokens[attempt]

    def _in_memory(self, name: str, content: bytes) -> str:
        """A file that is on no disk: the processes of the run open it where ours has it open."""
        descriptor = os.memfd_create(name)
        weakref.finalize(self, os.close, descriptor)
        os.write(descriptor, content)
        return f"/proc/{os.getpid()}/fd/{descriptor}"

    def _path(self, role: Role) -> FieldPath:
        return ("spec", _ROLE_FIELDS[role])

    def _container_environment(self, process: Process) -> dict[str, str]:
        """What a container of the process would be given."""
        job, addresses = self._job_of_processes(), self._addresses()
        # The folder of a run is there for ever: the model is kept also without a checkpoint volume.
        kept = {names.MODEL_DIR: self._checkpoint_dir() or str(self._folder.path.absolute())}
        own = kept | training_environment(
            job,
            process.role,
            process.index,
            process.attempt,
            addresses,
            metrics_port=process.metrics_port,
            termination_log=str(process.termination_log.absolute()),
            checkpoint_dir=self._checkpoint_dir(),
            data_dir=self._data_dir(),
            data_key=self._data_key,
            data_url_options=self._data_url_options,
            copies_dir=str(self._folder.copies(process.index).absolute()) if keeping_workers(job) else None,
            code_dir=str(self._code) if self._code is not None else None,
            tls_dir=self._tls_dir_of(process),
            workers_per_machine=1 if self._runs_command else job.spec.worker.most,
        )
        home = {name: os.environ[name] for name in ("HOME", "USER") if name in os.environ}
        defaults = home | default_environment(
            job,
            process.role,
            process.index,
            addresses,
            master_metrics=self._ports.address(Role.MASTER, 0, "metrics"),
            status_token=self._status_token(process.attempt) if reports_status(job, process.role) else "",
        )
        return self._template_environment(process.role, own | defaults, process.index, process.uid) | own

    def _template_environment(
        self, role: Role, known: Mapping[str, str], index: int = 0, uid: str = ""
    ) -> dict[str, str]:
        metadata = self._job.metadata
        fields = {
            "metadata.name": pod_name(metadata.name, role, index),
            "metadata.namespace": metadata.namespace,
            "metadata.uid": uid,
            f"metadata.labels['{LABEL_JOB_NAME}']": metadata.name,
            f"metadata.labels['{LABEL_ROLE}']": role.value,
            f"metadata.labels['{LABEL_INDEX}']": str(index),
            "spec.nodeName": LOCAL_NODE,
            "status.podIP": LOOPBACK,
            "status.hostIP": LOOPBACK,
        }
        return self._documents.environment(self._job.spec.template_of(role), self._path(role), known, fields)

    def _gpus_of(self, role: Role, index: int) -> list[str]:
        # "" hides every GPU, as a container that asked for none sees none.
        spec = self._job.spec
        each = spec.worker.gpus_per_worker if role is Role.WORKER else 0
        if self._runs_command:
            return self._gpus[index * each : (index + 1) * each]
        # The workers are processes of one machine: each sees the GPUs of all, and LOCAL_RANK picks its own.
        return self._gpus[: spec.worker.most * each]

    def _check(self) -> None:
        job = self._job
        wanted = job.spec.worker.most * job.spec.worker.gpus_per_worker
        if wanted > len(self._gpus):
            raise Unusable(
                ("spec", "worker", "gpusPerWorker"),
                f"the job needs {wanted} GPUs, this machine has {len(self._gpus)}; 0 runs it on the CPU",
            )
        if not (machine.importable(TRAINER) and machine.importable("torch")):
            raise Unusable((), "a local run needs the trainer and torch: pip install 'disttrain[trainer]'")
        self._check_code()
        for role in Role:
            self._template_environment(role, {})
        self._check_data()

    def _check_code(self) -> None:
        """The script's file and the factories' modules are there. Raises Unusable."""
        trainer, here = self._job.spec.trainer, Path.cwd()
        places = module_path(self._code) if self._code is not None else []
        # Of a job without code, of one whose code is here, of one for whose code the current folder stands.
        origin = trainer.code.origin if trainer.code is not None else ""
        where = str(here) if self._code is None else origin
        remedy = "run from its folder" if self._code is None else "correct the name"
        if origin and self._code is None:
            remedy = f"{origin} is not here either: add it to the file as a document, or run from the code's folder"
        script = trainer.script
        if script is not None and not Path(self._code or here, script.file).is_file():
            remedy = f"{remedy}, or name its ConfigMap as trainer.code.configMap" if not origin else remedy
            raise Unusable(("spec", "trainer", "script", "file"), f'no file "{script.file}" in {where}; {remedy}')
        for path, factory in trainer.factories():
            package = factory.partition(":")[0].partition(".")[0]
            if not machine.importable(package, places):
                places_said = f"{here} or" if self._code is None else f"{origin}, {here} or"
                raise Unusable(
                    ("spec", "trainer", *path),
                    f'no module "{package}" in {places_said} among the installed packages; {remedy}, or install it',
                )

    def _check_data(self) -> None:
        volume = self._job.spec.data.volume if self._job.spec.data else None
        if volume is None:
            return
        # Made even so: the message names it, and the next thing that its reader does is to copy something there.
        folder = self._folder.claim(volume.persistent_volume_claim)
        if not any(folder.iterdir()):
            raise Unusable(
                ("spec", "data", "volume", "persistentVolumeClaim"),
                f"there is no data: put it into {folder}/, which stands for the claim",
            )
