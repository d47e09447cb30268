"""What a cluster has for DistTrain, and what it lacks: version, CRD, operator, the user's rights, nodes, storage, schedulers.

Reads only, with the rights of the user. What these do not let it see is a finding too.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final, Protocol, TypeAlias

from disttrain.api.crd import crd
from disttrain.api.names import GPU, GROUP, PLURAL, VERSION
from disttrain.client.findings import Finding, Level
from disttrain.client.text import one_line
from disttrain.kube.api import ApiError, Body, NotFound

_OLDEST: Final = (1, 30)
"""Before 1.30 an API server refuses every change of a stored job that a newer rule of the CRD forbids."""
_INSTALL: Final = "kubectl apply --server-side -k deploy/base"
_OPERATOR: Final = "labelSelector=app.kubernetes.io%2Fname%3Ddisttrain-operator"
_HOME: Final = "disttrain-system"
"""Where deploy/base has the operator."""
_RIGHTS: Final = (
    # verb, group, resource, subresource, what it is needed for; "" of what no job runs without
    ("create", GROUP, PLURAL, "", ""),
    ("get", GROUP, PLURAL, "", ""),
    ("list", GROUP, PLURAL, "", ""),
    ("patch", GROUP, PLURAL, "", "suspend, resume, scale"),
    ("delete", GROUP, PLURAL, "", "cancel"),
    ("list", "", "pods", "", "status"),
    ("get", "", "pods", "log", "logs"),
    ("get", "", "pods", "proxy", "history, plot and report of a job that runs"),
    ("list", "", "events", "", "events"),
    ("create", "", "configmaps", "", "submit --code"),
    ("create", "", "secrets", "", "submit of a file with a Secret"),
    ("create", "", "persistentvolumeclaims", "", "submit of a file with a claim"),
)
_GANGS: Final = {"scheduling.volcano.sh": "Volcano", "scheduling.x-k8s.io": "Coscheduling", "kueue.x-k8s.io": "Kueue"}


class Api(Protocol):
    """The requests."""

    async def ask(self, path: str, body: Body | None = None) -> Body:
        """A GET of a path, or with a body a POST. Raises ApiError."""
        ...


Check: TypeAlias = Callable[[Api, str], Awaitable[list[Finding]]]


async def checks(api: Api, namespace: str) -> list[Finding]:
    """All findings about a cluster and one of its namespaces. Raises ApiError where the cluster does not answer at all."""
    answer = await api.ask("/version")
    found = [_version(answer)]
    all_checks: tuple[tuple[str, Check], ...] = (
        ("CRD", _crd),
        ("operator", _operator),
        ("namespace", _namespace),
        ("permissions", _rights),
        ("quota", _quotas),
        ("nodes", _nodes),
        ("storage", _storage),
        ("scheduler", _groups),
    )
    for findings in await asyncio.gather(*(_seen(name, check, api, namespace) for name, check in all_checks)):
        found += findings
    return found


async def _seen(name: str, check: Check, api: Api, namespace: str) -> list[Finding]:
    try:
        return await check(api, namespace)
    except ApiError as error:
        why = "you may not see it" if error.status == 403 else one_line(error.message) or f"HTTP {error.status}"
        return [Finding(name, Level.UNKNOWN, why)]


def _version(answer: Body) -> Finding:
    text = one_line(answer.get("gitVersion", "?"))
    numbers = re.match(r"v?(\d{1,4})\.(\d{1,4})", text)
    if numbers and (int(numbers[1]), int(numbers[2])) < _OLDEST:
        return Finding(
            "cluster", Level.WARNING, f"Kubernetes {text}", f"use Kubernetes {_OLDEST[0]}.{_OLDEST[1]} or newer"
        )
    return Finding("cluster", Level.OK, f"Kubernetes {text}")


async def _crd(api: Api, _: str) -> list[Finding]:
    try:
        await api.ask(f"/apis/{GROUP}/{VERSION}")
    except NotFound:
        return [Finding("CRD", Level.MISSING, f"the cluster has no {PLURAL}.{GROUP}", _INSTALL)]
    stored = await api.ask(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{PLURAL}.{GROUP}")
    ours, theirs = set(_fields(_schema(crd()))), set(_fields(_schema(stored)))
    if lacking := sorted(ours - theirs, key=lambda field: (field.count("."), field)):
        text = f"is older than this command: it has no {_first(lacking)}"
        return [Finding("CRD", Level.WARNING, text, "kubectl apply --server-side -f crds/disttrainjobs.yaml")]
    if more := sorted(theirs - ours, key=lambda field: (field.count("."), field)):
        text = f"is newer than this command, which does not know {_first(more)}"
        return [Finding("CRD", Level.WARNING, text, "install the version of disttrain that the cluster has")]
    return [Finding("CRD", Level.OK, f"{PLURAL}.{GROUP} {VERSION}, as this command knows it")]


async def _operator(api: Api, _: str) -> list[Finding]:
    try:
        found = await api.ask(f"/apis/apps/v1/deployments?{_OPERATOR}")
    except ApiError as error:
        if error.status != 403:
            raise
        found = await api.ask(f"/apis/apps/v1/namespaces/{_HOME}/deployments?{_OPERATOR}")
    deployments = _items(found)
    if not deployments:
        text = "no deployment of it is there; one outside of the cluster cannot be seen"
        return [Finding("operator", Level.WARNING, text, _INSTALL)]
    findings = []
    for one in deployments:
        metadata, ready = one.get("metadata") or {}, (one.get("status") or {}).get("readyReplicas") or 0
        containers = (((one.get("spec") or {}).get("template") or {}).get("spec") or {}).get("containers") or [{}]
        where = f"-n {one_line(metadata.get('namespace'))} deployment/{one_line(metadata.get('name'))}"
        image = one_line(containers[0].get("image", ""))
        if ready:
            findings.append(
                Finding("operator", Level.OK, f"{ready} ready in {one_line(metadata.get('namespace'))}, {image}")
            )
        else:
            findings.append(Finding("operator", Level.MISSING, f"none is ready, {image}", f"kubectl describe {where}"))
    return findings


async def _namespace(api: Api, namespace: str) -> list[Finding]:
    try:
        await api.ask(f"/api/v1/namespaces/{namespace}")
    except NotFound:
        return [
            Finding("namespace", Level.MISSING, f"{namespace} is not there", f"kubectl create namespace {namespace}")
        ]
    return [Finding("namespace", Level.OK, namespace)]


async def _rights(api: Api, namespace: str) -> list[Finding]:
    async def allowed(verb: str, group: str, resource: str, subresource: str) -> bool:
        about = {"namespace": namespace, "verb": verb, "group": group, "resource": resource, "subresource": subresource}
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {name: value for name, value in about.items() if value}},
        }
        answer = await api.ask("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body)
        return (answer.get("status") or {}).get("allowed") is True

    answers = await asyncio.gather(*(allowed(*right[:4]) for right in _RIGHTS))
    refused = [right for right, answer in zip(_RIGHTS, answers, strict=True) if not answer]
    mend = f"an admin: kubectl create rolebinding YOU-edit -n {namespace} --clusterrole=edit --user=YOU"
    findings = []
    if needed := [f"{verb} {resource}" for verb, _, resource, _, use in refused if not use]:
        findings.append(Finding("permissions", Level.MISSING, f"you may not {', '.join(needed)} in {namespace}", mend))
    for verb, _, resource, sub, use in refused:
        if use:
            text = f"you may not {verb} {resource}{f'/{sub}' if sub else ''} in {namespace}, which is needed for {use}"
            findings.append(Finding("permissions", Level.WARNING, text, mend))
    return findings or [Finding("permissions", Level.OK, f"all that the command needs in {namespace}")]


async def _quotas(api: Api, namespace: str) -> list[Finding]:
    findings = []
    for quota in _items(await api.ask(f"/api/v1/namespaces/{namespace}/resourcequotas")):
        name, status = one_line((quota.get("metadata") or {}).get("name")), quota.get("status") or {}
        hard, used = status.get("hard") or {}, status.get("used") or {}
        if full := [one_line(what) for what, most in hard.items() if used.get(what) == most]:
            text = f"{name} is used up: {', '.join(full)}"
            findings.append(Finding("quota", Level.WARNING, text, f"kubectl describe quota {name} -n {namespace}"))
    return findings


async def _nodes(api: Api, _: str) -> list[Finding]:
    nodes = _items(await api.ask("/api/v1/nodes?limit=500"))
    ready = [node for node in nodes if _usable(node)]
    if not ready:
        return [Finding("nodes", Level.MISSING, f"none of {len(nodes)} takes pods", "kubectl describe nodes")]
    gpus = [str(((node.get("status") or {}).get("allocatable") or {}).get(GPU, "0")) for node in ready]
    count = sum(int(number) for number in gpus if number.isdecimal())
    findings = [Finding("nodes", Level.OK, f"{len(ready)} of {len(nodes)} take pods, with {count} GPUs")]
    if not count:
        findings.append(
            Finding(
                "GPUs",
                Level.NOTE,
                f"no node offers {GPU}: gpusPerWorker must stay 0",
                "install the GPU operator or its device plugin",
            )
        )
    return findings


async def _storage(api: Api, _: str) -> list[Finding]:
    classes = _items(await api.ask("/apis/storage.k8s.io/v1/storageclasses"))
    names = [one_line((one.get("metadata") or {}).get("name")) for one in classes]
    default = [
        name
        for name, one in zip(names, classes, strict=True)
        if ((one.get("metadata") or {}).get("annotations") or {}).get("storageclass.kubernetes.io/is-default-class")
        == "true"
    ]
    if not classes:
        return [
            Finding(
                "storage",
                Level.WARNING,
                "no storage class: a claim waits until an admin makes a volume for it",
                "install a provisioner",
            )
        ]
    if not default:
        patch = '{"metadata":{"annotations":{"storageclass.kubernetes.io/is-default-class":"true"}}}'
        text = f"no default among {', '.join(names)}: a claim must name its storageClassName"
        return [Finding("storage", Level.WARNING, text, f"kubectl patch storageclass {names[0]} -p '{patch}'")]
    return [Finding("storage", Level.OK, f"{', '.join(names)}; default {default[0]}")]


async def _groups(api: Api, _: str) -> list[Finding]:
    groups = {str(one.get("name")) for one in (await api.ask("/apis")).get("groups") or ()}
    gangs = [name for group, name in _GANGS.items() if group in groups]
    text = (
        f"{', '.join(gangs)} beside the one of Kubernetes"
        if gangs
        else "that of Kubernetes alone: pods of a job are placed one by one"
    )
    findings = [Finding("scheduler", Level.OK if gangs else Level.NOTE, text)]
    if "monitoring.coreos.com" not in groups:
        findings.append(
            Finding("monitoring", Level.NOTE, "no Prometheus operator; pods say by annotations where their metrics are")
        )
    return findings


def _usable(node: Body) -> bool:
    conditions = (node.get("status") or {}).get("conditions") or ()
    ready = any(one.get("type") == "Ready" and one.get("status") == "True" for one in conditions)
    return ready and not (node.get("spec") or {}).get("unschedulable")


def _items(answer: Body) -> list[dict[str, Any]]:
    return [one for one in answer.get("items") or () if isinstance(one, dict)]


def _schema(definition: Body) -> Mapping[str, Any]:
    for one in (definition.get("spec") or {}).get("versions") or ():
        if one.get("name") == VERSION:
            found: Mapping[str, Any] = (one.get("schema") or {}).get("openAPIV3Schema") or {}
            return found
    return {}


def _fields(node: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The paths of all fields of a schema."""
    for name, child in (node.get("properties") or {}).items():
        where = f"{path}.{name}" if path else str(name)
        yield where
        yield from _fields(child, where)
    if isinstance(items := node.get("items"), Mapping):
        yield from _fields(items, path)


def _first(fields: list[str]) -> str:
    rest = len(fields) - 1
    return f"{one_line(fields[0])}{f', nor {rest} other fields' if rest else ''}"
