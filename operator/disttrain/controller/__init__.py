"""The operator: what watches the API server, asks `plan.decide` what to do, and does it. The only room that knows kopf and Kubernetes.

A watch event goes `handlers` -> `cache` -> `queue`; a worker of `reconcile` takes the job's key from there, freezes a `snapshot`, asks
the plan, has `apply` carry it out and `status` written. Beside that run `resync`, `progress`, `events`, `probes`; `process` holds it all.
"""
