"""Bodies of pods, as the API server gives them."""

from __future__ import annotations

from typing import Any

from disttrain.api.names import API_VERSION, KIND


def pod(
    version: int, *, uid: str = "u1", owner: str = "job-uid", name: str = "digits-worker-0", **status: Any
) -> dict[str, Any]:
    reference = {"apiVersion": API_VERSION, "kind": KIND, "name": "digits", "uid": owner, "controller": True}
    return {
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": uid,
            "resourceVersion": str(version),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {
                "disttrain.dev/job-name": "digits",
                "disttrain.dev/role": "worker",
                "disttrain.dev/index": "0",
                "disttrain.dev/attempt": "1",
            },
            "ownerReferences": [reference] if owner else [],
        },
        "spec": {"containers": []},
        "status": {"phase": "Pending", **status},
    }
