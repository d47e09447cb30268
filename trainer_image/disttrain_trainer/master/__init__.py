"""The master of a job: membership, the ledger of its work, its progress, its checkpoints. It never trains.

`hub` talks, `collective` and `served` decide, `ledger` and `tracker` count; only `hub` and `main` know sockets, threads and the clock.
"""
