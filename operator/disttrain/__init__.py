"""DistTrain: distributed training jobs, on Kubernetes with an operator, or with no cluster at all."""

__version__ = "0.1.0"
