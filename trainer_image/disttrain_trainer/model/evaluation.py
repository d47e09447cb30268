"""What the user's `evaluate` returned, in the form in which it travels to the master, into the manifest and the status."""

import json
from typing import Any

from disttrain.api.runtime import utf8
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

Evaluation = dict[str, float]

LONGEST_NAME = 253
"""Characters of the name of a number of an evaluation, as in the job's status."""
MOST_BYTES_OF_NUMBERS = 512 << 10
"""Of an evaluation: a message to the master holds a mebibyte."""
SHOWN_NUMBERS = 32
"""Numbers of an evaluation that the log has, as many as the job's status."""


def numbers_of(found: Any, name: str | None) -> Evaluation:
    """What the user's `evaluate` returned, in the form in which it travels to the master. Raises WrongInput."""
    try:
        numbers = {utf8(str(key))[:LONGEST_NAME]: float(value) for key, value in found.items()}
    except (
        AttributeError,
        TypeError,
        ValueError,
        OverflowError,
        RuntimeError,
    ):  # RuntimeError: a tensor of several elements
        raise WrongInput(
            f"trainer.evaluate: {name!r} returned {found!r:.200}; expected a dict of names and numbers"
        ) from None
    if (size := len(json.dumps(numbers))) > MOST_BYTES_OF_NUMBERS:
        raise WrongInput(
            f"trainer.evaluate: {name!r} returned {len(numbers)} numbers, {size >> 10} KiB as JSON; expected a few, at most "
            f"{MOST_BYTES_OF_NUMBERS >> 10} KiB: write the rest into a file"
        )
    shown = ", ".join(f"{key} {value:.4f}" for key, value in list(numbers.items())[:SHOWN_NUMBERS])
    more = f", and {len(numbers) - SHOWN_NUMBERS} more" if len(numbers) > SHOWN_NUMBERS else ""
    log.info("evaluation: %s%s", shown, more)
    return numbers
