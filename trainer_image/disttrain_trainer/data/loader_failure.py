"""An error that a loader process brings to the process that trains: shown there as if it were raised there."""

from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import NoReturn

from disttrain.api.termination import Termination
from disttrain_trainer.errors import OwnGroup, WrongInput
from disttrain_trainer.runtime import termination
from disttrain_trainer.runtime.termination import RaisedElsewhere


@dataclass(frozen=True, slots=True)
class Failure:
    """What loading a batch raised."""

    error: bytes | None
    """Pickled; None where that does not give the same error."""
    shown: str
    """Its traceback, from the first frame of the user's on."""
    reported: Termination

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """In the process where it was raised."""
        shown, reported = termination.of_user_error(error)
        if isinstance(error, OwnGroup):
            error = WrongInput(str(error))
        return cls(_pickled(error), shown, reported)

    def throw(self) -> NoReturn:
        """Raises it: the same type and message; what is shown of it is the line that raised it."""
        error: BaseException = RaisedElsewhere(self.reported.message)
        if self.error is not None:
            error = ForkingPickler.loads(self.error)
        termination.note_elsewhere(error, (self.shown, self.reported))
        raise error


def _pickled(error: BaseException) -> bytes | None:
    """None for an error whose class cannot be found by its name, or makes another error of what pickle keeps."""
    try:
        data = bytes(ForkingPickler.dumps(error))
        again = ForkingPickler.loads(data)
    except Exception:
        return None
    return data if type(again) is type(error) and str(again) == str(error) else None
