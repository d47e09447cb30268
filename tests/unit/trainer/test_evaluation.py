"""What an evaluation may return, and what is said of one that cannot travel to the master."""

from typing import Any

import pytest
import torch

from disttrain.api.runtime import Termination
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.evaluation import LONGEST_NAME, numbers_of
from disttrain_trainer.net import incoming
from disttrain_trainer.net.messages import MessageType, decode, encode


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"accuracy": torch.tensor([[0.5]]), 3: True}, {"accuracy": 0.5, "3": 1.0}),
        ({"x" * 5000: 1}, {"x" * LONGEST_NAME: 1.0}),
        ({"caf\udce9": 1}, {"caf?": 1.0}),
        ({"perplexity": float("inf")}, {"perplexity": float("inf")}),
        ({f"class {number}": 0.5 for number in range(5000)}, {f"class {number}": 0.5 for number in range(5000)}),
    ],
)
def test_the_master_understands_what_an_evaluation_returned(found: Any, expected: dict[str, float]) -> None:
    numbers = numbers_of(found, "mine:evaluate")
    assert numbers == expected
    message = decode(encode(MessageType.EVALUATED, stay="m.1", evaluation=numbers))
    assert incoming.parse(message)["evaluation"] == expected


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "returned None; expected a dict of names and numbers"),
        ({"per class": torch.ones(3)}, "expected a dict of names and numbers"),
        ({"big": 10**400}, "expected a dict of names and numbers"),
        (
            {f"sample {number}": 0.123456789 for number in range(60_000)},
            "returned 60000 numbers, .* KiB as JSON; expected",
        ),
    ],
)
def test_an_evaluation_that_cannot_travel_is_wrong_input(found: Any, said: str) -> None:
    with pytest.raises(WrongInput, match=rf"^trainer\.evaluate: 'mine:evaluate' .*{said}"):
        numbers_of(found, "mine:evaluate")


def test_the_message_of_an_error_that_utf8_cannot_hold_is_written_all_the_same() -> None:
    said = Termination.decode(Termination(message="cannot open caf\udce9.png", where="/home/\udce9/mine.py:3").encode())
    assert (said.message, said.where) == ("cannot open caf?.png", "/home/?/mine.py:3")
