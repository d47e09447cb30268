"""What can keep a request to a cluster from being carried out, in the words of a user: one line each, with what to do.

ClusterError
├── NoSuchJob      the namespace has no job of that name
├── JobExists      the namespace has a job of that name already
├── Rejected       the API server does not take the change: a rule, or wrong input
├── NotInstalled   the cluster has no DistTrainJob
├── OtherVersion   its CRD refuses a job that this version takes
├── NotPermitted   the user may not do it
└── NotReachable   no kubeconfig, no answer, or an expired login
"""

from typing import ClassVar

from disttrain.api.names import GROUP, PLURAL
from disttrain.client.text import one_line
from disttrain.kube.api import ApiError, NotFound, Unavailable


class ClusterError(Exception):
    """A request that was not carried out. The text is for the user."""

    exit_code: ClassVar = 2


class NoSuchJob(ClusterError): ...


class Rejected(ClusterError): ...


class NotReachable(ClusterError):
    exit_code: ClassVar = 3


class NotPermitted(ClusterError):
    exit_code: ClassVar = 4


class NotInstalled(ClusterError):
    exit_code: ClassVar = 5


class OtherVersion(ClusterError):
    exit_code: ClassVar = 6


class JobExists(ClusterError):
    exit_code: ClassVar = 7


def of_answer(error: ApiError, *, what: str, namespace: str | None, job: str = "") -> ClusterError:
    """What an answer of the API server means.

    what: the request, such as "list the jobs". namespace: None for all. job: the name of the job that it is about.
    """
    where = f"namespace {namespace}" if namespace else "all namespaces"
    said = one_line(error.message).strip()
    if said.startswith("<"):  # a page of HTML: an API server sends none
        return NotReachable(
            f"the cluster did not {what}: HTTP {error.status} from a program that is no API server, such as a proxy: {said[:100]}; "
            "check the server of the kubeconfig, and `kubectl cluster-info`"
        )
    if isinstance(error, NotFound):
        # Of an object that is missing the API server names the kind; of a kind that it does not know it has only the path.
        if job and f'"{job}" not found' in said:
            return NoSuchJob(f"{where} has no DistTrainJob {job}: `disttrain ls -A` lists those of all namespaces")
        if namespace and f'namespaces "{namespace}" not found' in said:
            return Rejected(f"there is no namespace {namespace}: `kubectl create namespace {namespace}` makes it")
        return NotInstalled(
            f"the cluster has no {PLURAL}.{GROUP}: install DistTrain there (kubectl apply -k deploy/base), or choose another --context"
        )
    if error.status == 403:
        return NotPermitted(
            f"you may not {what} in {where}: {said}; ask an admin for edit or view there, or choose "
            "another namespace with -n"
        )
    if isinstance(error, Unavailable):
        why = "your login has expired or is wrong" if error.status == 401 else said or f"HTTP {error.status}"
        return NotReachable(f"the cluster did not {what}: {why}; check `kubectl cluster-info`, and try again")
    return Rejected(f"the cluster did not {what}: {said}")
