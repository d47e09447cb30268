"""What is state: the buffers that state_dict() has, with the shapes of now; and what the user's model is when it is handed over."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from disttrain_trainer.checkpoint import tensor_file, tensors
from disttrain_trainer.checkpoint.buffers import Buffers
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.module import evaluating, prepare
from disttrain_trainer.parallel.hand_over import as_bytes


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grows", torch.zeros(2))
        self.register_buffer("late", None)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("wide", torch.ones(1).expand(3))
        self.register_buffer("other_name", self.grows)
        self.norm = nn.BatchNorm1d(2)


def taken_over(folder: Path, source: nn.Module, target: nn.Module) -> None:
    tensor_file.write(folder / "file", tensors.buffers_of(source))
    tensors.put_buffers(target, tensor_file.read(folder / "file"), source="the file")


def test_buffers_are_taken_over_with_their_shapes_and_those_that_are_no_state_are_not(tmp_path: Path) -> None:
    source, target = Tables(), Tables()
    source.grows = source.other_name = torch.arange(5.0)
    source.late = torch.tensor([7])
    source.register_buffer("new", torch.tensor(True))
    source.scratch = torch.ones(9)
    source.norm.running_mean.fill_(3)
    taken_over(tmp_path, source, target)
    assert target.grows.tolist() == [0, 1, 2, 3, 4]
    assert target.other_name is target.grows
    assert (target.late.tolist(), target.new.item(), target.scratch.tolist()) == ([7], True, [0, 0])
    assert target.norm.running_mean.tolist() == [3, 3]
    assert tensors.buffers_of(target).keys() == source.state_dict().keys() - dict(source.named_parameters()).keys()


def test_a_file_of_an_older_release_which_has_what_is_no_state_is_read(tmp_path: Path) -> None:
    target = Tables()
    tensors.put_buffers(target, {"scratch": torch.ones(7), "grows": torch.ones(2)}, source="the file")
    assert (target.scratch.tolist(), target.grows.tolist()) == ([0, 0], [1, 1])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_module_of_torchscript_gives_and_takes_buffers_as_any_other() -> None:
    scripted, resumed = (torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))) for _ in range(2))
    scripted(torch.randn(8, 2))
    assert tensors.may_have_buffers(scripted)
    found = tensors.buffers_of(scripted)
    assert found.keys() == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    tensors.put_buffers(resumed, found, source="here")
    assert all(torch.equal(value, found[name]) for name, value in tensors.buffers_of(resumed).items())


def test_a_buffer_without_a_place_is_of_another_model() -> None:
    with pytest.raises(WrongInput, match=r"the file is of another model: body\.mean"):
        tensors.put_buffers(Tables(), {"body.mean": torch.ones(2)}, source="the file")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.int64])
def test_buffers_of_any_type_are_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    source, target = nn.Module(), nn.Module()
    for module, value in ((source, 1), (target, 0)):
        module.register_buffer("mask", torch.full((3,), value).to(dtype))
    tensors.check_buffers(source)
    taken_over(tmp_path, source, target)
    assert target.mask.dtype == dtype
    assert target.mask.to(torch.complex64).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("buffer", "said"),
    [
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "nested"),
    ],
    ids=["nested"],
)
def test_a_buffer_that_cannot_be_saved_is_refused_by_name_unless_it_is_no_state(
    buffer: torch.Tensor, said: str, tmp_path: Path
) -> None:
    module = nn.Module()
    module.register_buffer("adjacency", buffer)
    with pytest.raises(WrongInput, match=f"buffer adjacency is .*{said}.*persistent=False"):
        Buffers(module, tmp_path)
    Buffers(module, None)
    module.register_buffer("adjacency", buffer, persistent=False)
    assert not Buffers(module, tmp_path).there_are_some


def test_a_frozen_parameter_that_cannot_be_saved_is_refused_by_name() -> None:
    module = nn.Linear(2, 2)
    module.adjacency = nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False)
    with pytest.raises(WrongInput, match="parameter adjacency is sparse"):
        tensors.check_parameters(dict(module.named_parameters()))


def test_a_frozen_parameter_that_is_expanded_gets_memory_of_its_own() -> None:
    module = nn.Linear(2, 2)
    module.scale = nn.Parameter(torch.ones(1).expand(3), requires_grad=False)
    prepare(module)
    tensors.take_over({"scale": module.scale.detach()}, {"scale": torch.arange(3.0)}, source="a file")
    assert module.scale.tolist() == [0, 1, 2]


@pytest.mark.parametrize("buffer", [torch.ones(2, dtype=torch.complex64).conj(), torch.ones(2) * 1j])
def test_a_buffer_that_is_a_conjugate_has_bytes_to_be_handed_over(buffer: torch.Tensor) -> None:
    for tensor in (buffer, buffer.imag, buffer.conj().imag):
        assert as_bytes(tensor).view(tensor.dtype).tolist() == tensor.tolist()


class Scaled(nn.Module):
    scale = torch.tensor(2.0)

    def get_extra_state(self) -> torch.Tensor:
        return self.scale

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.scale = state


def test_extra_state_is_saved_when_it_is_a_tensor(tmp_path: Path) -> None:
    source, target = nn.Sequential(Scaled()), nn.Sequential(Scaled())
    source[0].scale = torch.tensor(5.0)
    taken_over(tmp_path, source, target)
    assert target[0].scale == 5


JSON = {"counts": [1, 2.5, None], "names": {"a": "é", "": True}, "nothing": []}


def test_extra_state_is_saved_when_it_is_json(tmp_path: Path) -> None:
    source, target = nn.Sequential(Scaled()), nn.Sequential(Scaled())
    source[0].scale = JSON  # type: ignore[assignment]
    tensors.check_extra_state(source)
    taken_over(tmp_path, source, target)
    assert target[0].scale == JSON
    other = nn.Sequential(Scaled())
    tensors.copy_buffers(other, source)
    assert other[0].scale == JSON


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ((1, 2), "a tuple"),
        ({"a": [{"b": torch.zeros(1)}]}, "a Tensor"),
        ({"a": {1: 2}}, "the key 1"),
        (object(), "an object"),
        (b"pickled", "a bytes"),
    ],
)
def test_other_extra_state_is_refused_by_the_name_of_its_module(state: object, what: str) -> None:
    module = nn.Sequential(nn.Identity(), Scaled())
    module[1].scale = state  # type: ignore[assignment]
    with pytest.raises(
        WrongInput, match=rf"the extra state of module 1 holds {what}, which is no JSON: .*get_extra_state"
    ):
        tensors.check_extra_state(module)


def test_a_model_in_eval_mode_is_trained_and_one_with_a_part_in_eval_mode_keeps_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)).eval()
    prepare(model)
    assert all(module.training for module in model.modules())
    assert "returned a model in eval mode" in caplog.text
    model[1].eval()
    prepare(model)
    assert "stay in eval mode, as trainer.model returned them: 1" in caplog.text
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


def inferred() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.LazyLinear(2), "weight has no shape yet"),
        (nn.Linear(2, 2, device="meta"), "weight is on the meta device"),
        (nn.Sequential(nn.LazyBatchNorm1d(affine=False)), r"buffer 0\.running_mean has no shape yet"),
        (nn.ParameterList([nn.Parameter(torch.eye(2).to_sparse())]), "parameter 0 has the layout torch.sparse_coo"),
        (inferred(), r"weight was made under torch\.inference_mode"),
    ],
    ids=["lazy", "meta", "lazy buffer", "sparse", "inference"],
)
def test_a_model_without_values_is_refused_by_name(module: nn.Module, said: str) -> None:
    with pytest.raises(WrongInput, match=said):
        prepare(module)


def target_network(value: float) -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 1), nn.Linear(2, 1))
    module[1].requires_grad_(False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


class Sharing(nn.Module):
    """Two layers, and what is put into the place of the second's weight."""

    def __init__(self, second: Callable[[torch.Tensor], object], *, frozen: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.a.requires_grad_(not frozen)
        with torch.no_grad():
            found = second(self.a.weight)
        if isinstance(found, nn.Parameter):
            self.b.weight = found
        else:
            assert isinstance(found, torch.Tensor)
            self.register_buffer("seen", found)


@pytest.mark.parametrize(
    "second",
    [
        lambda weight: nn.Parameter(weight.t()),
        lambda weight: nn.Parameter(weight.data),
        lambda weight: nn.Parameter(weight[1:3]),
        lambda weight: nn.Parameter(weight.detach(), requires_grad=False),
        lambda weight: weight[:, 2],
    ],
)
def test_parameters_that_share_memory_without_being_one_are_refused_by_name(
    second: Callable[[torch.Tensor], object],
) -> None:
    with pytest.raises(
        WrongInput, match=r"^trainer\.model: (a\.weight and (b\.weight|seen)|b\.weight and a\.weight) share memory"
    ):
        prepare(Sharing(second))


def test_parameters_of_one_storage_without_a_common_element_are_taken_and_so_are_frozen_and_tied_ones() -> None:
    both = torch.zeros(4, 8)
    module = Sharing(lambda _: nn.Parameter(both[:, 4:]))
    module.a.weight = nn.Parameter(both[:, :4])
    prepare(module)
    prepare(Sharing(lambda weight: weight[:, 2], frozen=True))
    prepare(Sharing(lambda weight: weight))


def test_a_frozen_parameter_that_user_code_changes_is_saved_and_restored_with_the_buffers(tmp_path: Path) -> None:
    module, resumed = target_network(1), target_network(1)
    buffers = Buffers(module, tmp_path)
    assert buffers.there_are_some
    with torch.no_grad():
        module[1].weight.mul_(3)  # type: ignore[operator, union-attr]
    (tmp_path / "1").mkdir()
    file = str(buffers.save("1")()["file"])
    Buffers(resumed, tmp_path).restore(f"1/{file}")
    assert torch.equal(resumed[1].weight, module[1].weight)  # type: ignore[arg-type]
    buffers.reset(target_network(1))
    assert torch.equal(module[1].weight, target_network(1)[1].weight)  # type: ignore[arg-type]
