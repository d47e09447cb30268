"""trainer.activationCheckpointing and trainer.compile: how the blocks of a model are computed."""

from collections.abc import Sequence

from torch import nn

from disttrain.api.trainer import Trainer
from disttrain_trainer.model import activations, compilation
from disttrain_trainer.model.activations import Replay
from disttrain_trainer.model.blocks import blocks_of
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)


def apply(
    model: nn.Module, trainer: Trainer, *, called: Sequence[nn.Module] = (), replay: Replay | None = None
) -> None:
    """Changes the blocks of the model in place as the job asks for, and says in the log where that cannot be.

    called: the modules of a pipeline that are called in place of the model. replay: see activations.recompute.
    """
    if not (trainer.activation_checkpointing or trainer.compile):
        return
    blocks = blocks_of(model)
    if called:
        inside = {id(module) for one in called for module in one.modules()}
        blocks = [block for block in blocks if id(block) in inside]
    if not blocks:
        names = ["activationCheckpointing"] * trainer.activation_checkpointing + ["compile"] * trainer.compile
        log.warning(
            "trainer.%s %s nothing: trainer.model has no ModuleList or Sequential with parameters of its own",
            " and ".join(names),
            "changes" if len(names) == 1 else "change",
        )
        return
    if trainer.activation_checkpointing:
        activations.recompute(blocks, **({} if replay is None else {"replay": replay}))
    if trainer.compile:
        if (lacks := compilation.why_not()) is not None:
            log.warning("trainer.compile: the model is not compiled: %s", lacks)
        else:
            compilation.compile_blocks(blocks)
