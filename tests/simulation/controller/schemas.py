"""CRDs of other releases than the operator's, as the API server applies them to a job that is written."""

from disttrain.kube.api import JOBS, ApiError, Body, Refused, Resource

_NOT_YET = ("disruptions", "goodput", "partsPerStep")
"""Fields of the status that the earlier release did not have. It had decimals as strings."""


def newer(resource: Resource, body: Body) -> Body:
    """A later release: a field with a default in the spec, and one of the status that its operator wrote."""
    if resource is not JOBS or not body.get("spec"):
        return body
    spec = {**body["spec"], "futureField": "Auto", "runPolicy": {**body["spec"].get("runPolicy", {}), "futureLimit": 3}}
    status = {"status": {**body["status"], "futureStatus": {"a": 1}}} if body.get("status") else {}
    return {**body, "spec": spec, **status}


def older(resource: Resource, body: Body) -> Body:
    """An earlier release: it drops what it does not know."""
    if resource is not JOBS or not body.get("status"):
        return body
    return {**body, "status": {field: value for field, value in body["status"].items() if field not in _NOT_YET}}


def refused_by_older(resource: Resource, patch: Body) -> ApiError | None:
    """Of a status that has a number where the earlier release has a string."""
    training = (patch.get("status") or {}).get("training") or {}
    if resource is JOBS and isinstance(training.get("loss"), float):
        return Refused(422, "Invalid", "must be of type string", fields=("status.training.loss",))
    return None
