"""What session.checkpoint keeps comes back as it was, and what a pickle would be needed for is refused by its place."""

from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain_trainer.checkpoint import tensor_file
from disttrain_trainer.checkpoint.script_state import StateOfScript, read_state
from disttrain_trainer.errors import WrongInput

STATE = {
    "step": 3,
    "rate": 0.5,
    "names": ["a", None, True],
    "moments": {"mean": torch.ones(2, dtype=torch.bfloat16), "list": [torch.zeros(())]},
}


def through_a_file(state: StateOfScript, folder: Path) -> Any:
    tensor_file.write(folder / "buffers-0.safetensors", {"running_mean": torch.ones(1), **state.tensors()})
    return read_state(folder / "buffers-0.safetensors")


def test_tensors_and_json_come_back(tmp_path: Path) -> None:
    state = StateOfScript()
    state.keep(STATE)
    found = through_a_file(state, tmp_path)
    moments = found.pop("moments")
    assert found == {name: value for name, value in STATE.items() if name != "moments"}
    assert moments["mean"].dtype is torch.bfloat16
    assert torch.equal(moments["mean"], torch.ones(2, dtype=torch.bfloat16))
    assert torch.equal(moments["list"][0], torch.zeros(()))


def test_a_copy_is_kept(tmp_path: Path) -> None:
    state, tensor = StateOfScript(), torch.ones(2)
    state.keep({"tensor": tensor})
    tensor.zero_()
    assert torch.equal(through_a_file(state, tmp_path)["tensor"], torch.ones(2))


def test_what_was_found_is_kept_until_there_is_something_newer(tmp_path: Path) -> None:
    state = StateOfScript()
    state.keep_found({"step": 2})
    assert through_a_file(state, tmp_path) == {"step": 2}
    state.keep({"step": 3})
    state.keep_found({"step": 2})
    assert through_a_file(state, tmp_path) == {"step": 3}


def test_without_a_state_there_is_none(tmp_path: Path) -> None:
    assert through_a_file(StateOfScript(), tmp_path) is None


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ([1], "checkpoint got a list; expected a dict"),
        ({"a": {"b": [1, (2, 3)]}}, r"state\['a'\]\['b'\]\[1\] is a tuple"),
        ({1: 2}, "state is a dict"),
        ({"a": float("nan")}, r"state\['a'\] is a float"),
        ({"a": torch.eye(2).to_sparse()}, r"state\['a'\] is a tensor of torch.float32 and torch.sparse_coo"),
        ({"$tensor": "x"}, "state is a dict"),
    ],
)
def test_anything_else_is_refused_by_its_place(state: Any, said: str) -> None:
    with pytest.raises(WrongInput, match=said):
        StateOfScript().keep(state)
