"""Whose children they are: ownerReferences and labels. The garbage collector removes them with the job, also with the operator gone."""

from typing import Any

from disttrain.api.job import DistTrainJob
from disttrain.api.names import API_VERSION, KIND, LABEL_JOB_NAME


def child_metadata(job: DistTrainJob, name: str) -> dict[str, Any]:
    """The metadata of every child of the job."""
    return {
        "name": name,
        "namespace": job.metadata.namespace,
        "labels": {LABEL_JOB_NAME: job.metadata.name},
        "ownerReferences": [owner_reference(job)],
    }


def owner_reference(job: DistTrainJob) -> dict[str, Any]:
    """The reference to the job; `controller` is what tells our children from those that only mention us."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": job.metadata.name,
        "uid": job.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
