"""A process on its machine: environment, signals, logs, sockets, subprocesses, metrics. No torch."""
