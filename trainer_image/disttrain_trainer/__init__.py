"""The trainer: what runs in the pods of a DistTrainJob, or as processes of a local run.

It knows the job through `disttrain.api` alone and never sees Kubernetes. A process reads its configuration from the environment
(`disttrain.api.environment`), takes a role (master, parameter server, worker), and answers with an exit code.
"""
