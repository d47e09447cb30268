"""The DistTrainJob: what users write, what they read back, and what a training process gets.

The floor of the house: it imports pydantic and nothing else, so that the operator, the command line and the trainer can all stand on it.
A name that is asked for here is imported then: pydantic's models take half a second, and parts such as the history need none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from disttrain.api.job import DistTrainJob, Metadata
    from disttrain.api.runtime import JobConfig, Progress
    from disttrain.api.spec import DistTrainJobSpec
    from disttrain.api.status import DistTrainJobStatus
    from disttrain.api.termination import Termination

__all__ = ["DistTrainJob", "DistTrainJobSpec", "DistTrainJobStatus", "JobConfig", "Metadata", "Progress", "Termination"]

_HOMES: Final = {
    **dict.fromkeys(("DistTrainJob", "Metadata"), "job"),
    **dict.fromkeys(("JobConfig", "Progress"), "runtime"),
    "DistTrainJobSpec": "spec",
    "DistTrainJobStatus": "status",
    "Termination": "termination",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
