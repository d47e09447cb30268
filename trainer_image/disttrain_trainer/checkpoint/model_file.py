"""The trained model as its user takes it away: one safetensors file with the names of `model.state_dict()`, beside no other state.

    model.load_state_dict(safetensors.torch.load_file("model.safetensors"))

Parameters and the buffers that are state, tied weights under each of their names.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from disttrain.api import digests
from disttrain.api.names import MODEL_FILE
from disttrain.api.runtime import ProgressModel
from disttrain.api.tensor_index import EXTRA_JSON
from disttrain_trainer.checkpoint import composite, final, tensor_file, tensors
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)


def place_of(model: nn.Module, folder: Path | None) -> Path | None:
    """The folder; None where there is none, or the file cannot hold the model. Says in the log why it cannot."""
    if folder is None:
        return None
    try:
        tensors.check_parameters(dict(model.named_parameters()))
        tensors.check_buffers(model)
    except WrongInput as error:
        log.warning("no %s is written at the end: %s", MODEL_FILE, error)
        return None
    left_out: dict[str, None] = {}  # a set that keeps its order
    for name in tensors.buffers_of(model):
        if name.endswith(EXTRA_JSON):
            module = name.removesuffix(EXTRA_JSON).rstrip(".") or "the model itself"
            left_out[f"the extra state of module {module}, which is no tensor"] = None
        elif composite.is_part(name):
            left_out[f"buffer {composite.owner_of(name)}, which safetensors cannot hold"] = None
    for what in left_out:
        log.warning("%s will not have %s: load it with strict=False; checkpoints have it", MODEL_FILE, what)
    return folder


def state_of(model: nn.Module) -> tensor_file.Named:
    """What the file holds of a model: the tensors of `state_dict()` that safetensors has a type for."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and tensors.can_be_saved(value)
    }


def write(state: tensor_file.Named | tensor_file.Sources, folder: Path) -> ProgressModel:
    """Writes the tensors of `state_dict()` as `model.safetensors` into a folder, in place of an earlier one; its path and sha256.

    Blocks until the file is durable. Tied weights are written under each of their names. Raises OSError.
    """
    path = folder / MODEL_FILE
    for left in folder.glob(
        f".{MODEL_FILE}.*.tmp"
    ):  # of a writer that was killed; one that lives fails, and writes again
        with contextlib.suppress(OSError):
            left.unlink()
    written = ProgressModel(path=str(path), sha256=tensor_file.write(path, state, algorithm=digests.SHA256))
    log.info("the model is in %s", path)
    return written


def insist(write: Callable[[], ProgressModel], *, step: int, over: Callable[[float], bool]) -> ProgressModel | None:
    """Calls `write` at the end of a training, again while the volume has no room or is broken; the model is part of the job.

    step: the last one, for messages. over: as of `final.insist`; None when it ends the tries. Raises Unsaved when it fails for too long.
    """
    written: list[ProgressModel] = []

    def attempt() -> str | None:
        try:
            written.append(write())
        except OSError as error:
            log.error("the model was not written: %s; it is tried again in %g s", error, final.RETRY_SECONDS)
            return str(error)
        return None

    return written[0] if final.insist("model", step, attempt, over=over) else None
