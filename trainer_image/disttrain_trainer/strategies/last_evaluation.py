"""The evaluation of a cut model after its last step: by the cut model itself, or by the whole one where it asks for more than a call."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from disttrain_trainer.checkpoint import by_name
from disttrain_trainer.checkpoint.by_name import NamedCheckpoint
from disttrain_trainer.checkpoint.measured import Evaluation
from disttrain_trainer.parallel.pipeline import Pipeline
from disttrain_trainer.parallel.pipeline_forward import NeedsWholeModel
from disttrain_trainer.parallel.sharded_model import ShardedModel
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)


def measure(
    evaluate: Callable[[nn.Module], Evaluation],
    model: ShardedModel,
    run: Pipeline | None,
    *,
    make_whole: Callable[[], nn.Module] | None,
    device: torch.device,
    folder: Path | None,
) -> Evaluation | None:
    """The numbers, by the cut model: every rank calls it, with the same batches. None on a rank that leaves it to rank 0.

    run: that of this rank's stages. make_whole: returns a model to put the last state into; None on all ranks but the first. folder: of the
    last state; None where the job has no volume.
    """
    if run is None:
        return evaluate(model.module)
    try:
        return evaluate(run.forward_model())
    except NeedsWholeModel as error:
        if make_whole is None:
            return None
        if folder is None:
            log.warning("trainer.evaluate gives no numbers: %s, and the job has no volume to put it together on", error)
            return None
        log.warning(
            "%s: worker-0 puts the whole model together for it, which needs %.1f MiB", error, _mebibytes_of(folder)
        )
        whole = make_whole()
        by_name.load_model(folder, whole, source=str(folder))
        return evaluate(whole.to(device))


def _mebibytes_of(folder: Path) -> float:
    with NamedCheckpoint(folder) as checkpoint:
        return sum(source.bytes for source in checkpoint.sources().values()) / (1 << 20)
