"""What `disttrain doctor` says of clusters, from the answers of their API servers."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from disttrain.api.crd import crd
from disttrain.api.names import GPU
from disttrain.client.cluster_checks import checks
from disttrain.client.findings import Finding, Level
from disttrain.kube.api import ApiError, Body, NotFound, Refused, Unavailable

CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/disttrainjobs.disttrain.dev"
DEPLOYMENTS = "/deployments?labelSelector=app.kubernetes.io%2Fname%3Ddisttrain-operator"
WELL: dict[str, Any] = {
    "/version": {"gitVersion": "v1.34.1"},
    "/apis/disttrain.dev/v1alpha1": {},
    CRD: crd(),
    f"/apis/apps/v1{DEPLOYMENTS}": {
        "items": [
            {
                "metadata": {"name": "disttrain-operator", "namespace": "disttrain-system"},
                "spec": {"template": {"spec": {"containers": [{"image": "disttrain/operator:1"}]}}},
                "status": {"readyReplicas": 1},
            }
        ]
    },
    "/api/v1/namespaces/team": {},
    "/api/v1/namespaces/team/resourcequotas": {"items": []},
    "/api/v1/nodes?limit=500": {
        "items": [{"status": {"conditions": [{"type": "Ready", "status": "True"}], "allocatable": {GPU: "8"}}}]
    },
    "/apis/storage.k8s.io/v1/storageclasses": {
        "items": [
            {"metadata": {"name": "fast", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}}
        ]
    },
    "/apis": {"groups": [{"name": "scheduling.volcano.sh"}, {"name": "monitoring.coreos.com"}]},
}
FORBIDDEN = Refused(403, "Forbidden", "no")


class Server:
    """Answers by their paths; 404 for every other one."""

    def __init__(self, answers: dict[str, Any], refused: tuple[str, ...] = ()) -> None:
        self.answers, self.refused = answers, refused

    async def ask(self, path: str, body: Body | None = None) -> Body:
        if body is not None:
            return {"status": {"allowed": body["spec"]["resourceAttributes"]["resource"] not in self.refused}}
        answer = self.answers.get(path, NotFound(404, "NotFound", "not found"))
        if isinstance(answer, ApiError):
            raise answer
        return answer


async def found(answers: dict[str, Any], refused: tuple[str, ...] = ()) -> list[Finding]:
    findings = await checks(Server(WELL | answers, refused), "team")
    return [one for one in findings if one.level is not Level.OK]


async def test_of_a_cluster_that_has_all_nothing_is_said() -> None:
    assert await found({}) == []


@pytest.mark.parametrize(
    ("answers", "level", "text", "mend"),
    [
        ({"/version": {"gitVersion": "v1.27.3-eks"}}, Level.WARNING, "v1.27.3", "1.30 or newer"),
        (
            {"/apis/disttrain.dev/v1alpha1": NotFound(404, "", "")},
            Level.MISSING,
            "has no disttrainjobs.disttrain.dev",
            "kubectl apply --server-side -k deploy/base",
        ),
        ({f"/apis/apps/v1{DEPLOYMENTS}": {"items": []}}, Level.WARNING, "no deployment of it", "deploy/base"),
        (
            {f"/apis/apps/v1{DEPLOYMENTS}": {"items": [{"metadata": {"name": "o", "namespace": "s"}}]}},
            Level.MISSING,
            "none is ready",
            "kubectl describe -n s deployment/o",
        ),
        ({"/api/v1/namespaces/team": NotFound(404, "", "")}, Level.MISSING, "team", "kubectl create namespace team"),
        (
            {
                "/api/v1/namespaces/team/resourcequotas": {
                    "items": [{"metadata": {"name": "q"}, "status": {"hard": {"pods": "4"}, "used": {"pods": "4"}}}]
                }
            },
            Level.WARNING,
            "q is used up: pods",
            "kubectl describe quota q -n team",
        ),
        ({"/api/v1/nodes?limit=500": {"items": [{}]}}, Level.MISSING, "none of 1 takes pods", "kubectl"),
        ({"/apis/storage.k8s.io/v1/storageclasses": {"items": []}}, Level.WARNING, "no storage class", "provisioner"),
        (
            {"/apis/storage.k8s.io/v1/storageclasses": {"items": [{"metadata": {"name": "slow"}}]}},
            Level.WARNING,
            "no default among slow",
            "kubectl patch storageclass slow",
        ),
        ({"/apis": {"groups": [{"name": "monitoring.coreos.com"}]}}, Level.NOTE, "that of Kubernetes alone", ""),
        ({"/api/v1/nodes?limit=500": FORBIDDEN}, Level.UNKNOWN, "you may not see it", ""),
    ],
)
async def test_what_is_missing_has_a_command_that_mends_it(
    answers: dict[str, Any], level: Level, text: str, mend: str
) -> None:
    (one,) = await found(answers)
    assert one.level is level
    assert text in one.text
    assert mend in one.mend


async def test_a_crd_of_another_version_is_named_by_its_first_field() -> None:
    older = copy.deepcopy(crd())
    del older["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["network"]
    (one,) = await found({CRD: older})
    assert one.text.startswith("is older than this command: it has no spec.network, nor ")
    newer = copy.deepcopy(crd())
    newer["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["later"] = {}
    (one,) = await found({CRD: newer})
    assert one.text == "is newer than this command, which does not know spec.later"


async def test_rights_that_few_verbs_need_are_warnings() -> None:
    (one,) = await found({}, refused=("configmaps",))
    assert one.level is Level.WARNING
    assert one.text == "you may not create configmaps in team, which is needed for submit --code"
    assert "disttrainjobs" in next(one.text for one in await found({}, refused=("disttrainjobs",)))


async def test_a_cluster_that_does_not_answer_is_an_error() -> None:
    with pytest.raises(Unavailable):
        await found({"/version": Unavailable(0, "", "no answer")})
