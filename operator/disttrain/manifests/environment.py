"""The environment of a training process: the torchrun variables and DISTTRAIN_*. The same code for pods and for local processes.

Not here: what the agent in a worker sets for each of its processes (LOCAL_RANK above 0, TORCHELASTIC_*), and what a template adds.
"""

from disttrain.api import environment as env
from disttrain.api.job import DistTrainJob
from disttrain.api.names import CONTROL_PORT, RENDEZVOUS_PORT, SERVER_PORT, Role, pod_host
from disttrain.api.runtime import Addresses, JobConfig


def cluster_addresses(job: DistTrainJob) -> Addresses:
    """Where the processes listen on a cluster: names of the job's Service."""
    name = job.metadata.name
    servers = job.spec.parameter_server.replicas if job.spec.parameter_server else 0
    # A command has no agent that would tell torch of a store elsewhere: there rank 0 hosts it itself.
    host = pod_host(name, Role.MASTER if job.spec.trainer.command is None else Role.WORKER, 0)
    return Addresses(
        control=f"{pod_host(name, Role.MASTER, 0)}:{CONTROL_PORT}",
        rendezvous=f"{host}:{RENDEZVOUS_PORT}",
        parameter_servers=tuple(
            f"{pod_host(name, Role.PARAMETER_SERVER, index)}:{SERVER_PORT}" for index in range(servers)
        ),
    )


def job_config(job: DistTrainJob, attempt: int, addresses: Addresses) -> JobConfig:
    """What every process of an attempt is told."""
    return JobConfig(
        namespace=job.metadata.namespace,
        name=job.metadata.name,
        uid=job.metadata.uid,
        attempt=attempt,
        strategy=job.spec.strategy,
        trainer=job.spec.trainer,
        data=job.spec.data,
        checkpoint=job.spec.checkpoint,
        workers=job.spec.worker.replicas,
        processes_per_worker=job.spec.processes_per_worker,
        gpus_per_worker=job.spec.worker.gpus_per_worker,
        parameter_servers=job.spec.parameter_server.replicas if job.spec.parameter_server else 0,
        addresses=addresses,
    )


def training_environment(
    job: DistTrainJob,
    role: Role,
    index: int,
    attempt: int,
    addresses: Addresses,
    *,
    metrics_port: int,
    termination_log: str,
    checkpoint_dir: str | None = None,
    data_dir: str | None = None,
) -> dict[str, str]:
    """The variables of one process. Ranks are those of the pod's first process; only workers have them."""
    config = job_config(job, attempt, addresses)
    host, _, port = addresses.rendezvous.rpartition(":")
    variables = {
        env.MASTER_ADDR: host,
        env.MASTER_PORT: port,
        env.WORLD_SIZE: str(config.world_size),
        env.JOB: config.model_dump_json(by_alias=True, exclude_none=True),
        env.ROLE: role.value,
        env.INDEX: str(index),
        env.ATTEMPT: str(attempt),
        env.METRICS_PORT: str(metrics_port),
        env.TERMINATION_LOG: termination_log,
    }
    if role is Role.WORKER:
        variables |= {
            env.RANK: str(index * config.processes_per_worker),
            env.LOCAL_RANK: "0",
            env.LOCAL_WORLD_SIZE: str(config.processes_per_worker),
            env.GROUP_RANK: str(index),
        }
    if checkpoint_dir is not None:
        variables[env.CHECKPOINT_DIR] = checkpoint_dir
    if data_dir is not None:
        variables[env.DATA_DIR] = data_dir
    return variables


def default_environment(job: DistTrainJob, role: Role) -> dict[str, str]:
    """What a process has unless its template sets it to something else.

    All workers of our own loop iterate over a set of strings in the same order. A vocabulary that a dataset numbers so would otherwise
    be another one in each worker, and the training would be of no use without a word.
    """
    if role is not Role.WORKER or job.spec.trainer.model is None:
        return {}
    return {env.HASH_SEED: str(job.spec.trainer.seed)}
