"""The DistTrainJob: what users write, what they read back, and what a training process gets.

The floor of the house: it imports pydantic and nothing else, so that the operator, the command line and the trainer can all stand on it.
"""

from disttrain.api.job import DistTrainJob, Metadata
from disttrain.api.runtime import JobConfig, Progress, Termination
from disttrain.api.spec import DistTrainJobSpec
from disttrain.api.status import DistTrainJobStatus

__all__ = ["DistTrainJob", "DistTrainJobSpec", "DistTrainJobStatus", "JobConfig", "Metadata", "Progress", "Termination"]
