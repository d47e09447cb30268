"""The operator: it watches the API server, asks `plan.decide` what to do, and does it. It decides nothing itself.

A watch event goes `handlers` -> `intake` -> `cache` and `queue`. A worker of `reconcile` takes the job's key from the queue, makes a
`snapshot` of the cache and the job's `record`, asks the plan, lets `apply` carry it out, and writes the `status`. In the background run
`resync`, `progress`, `volume_failures`, `events` and `probes`. `parts` puts all that knows jobs together; `process` adds kopf, the Lease,
the port and the signals.
"""
